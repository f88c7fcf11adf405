// Streams one answer: `node generate_stream.mjs HOST:PORT ADAPTER PROMPT` ("" is the base model).
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import protobuf from 'protobufjs';

const protos =
  process.env.CALUMMA_PROTOS ?? fileURLToPath(new URL('../../../protos', import.meta.url));
const definition = protoLoader.loadSync('calumma/gateway/v1/gateway.proto', {
  includeDirs: [protos],
  keepCase: true, // field names as in the proto
  defaults: true, // a field at its default, such as an empty text, is not on the wire
  longs: Number,
  enums: String,
  oneofs: true, // response.event is the name of the field that is set
});
const { InferenceService } = grpc.loadPackageDefinition(definition).calumma.gateway.v1;

// What gRPC puts into the trailer `grpc-status-details-bin` of a failed call.
const rpc = protobuf.parse(
  `
  syntax = "proto3";
  package google.rpc;
  message Detail { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Detail details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
`,
  { keepCase: true },
).root;

function errorInfo(error) {
  const [trailer] = error.metadata.get('grpc-status-details-bin');
  const details = trailer ? rpc.lookupType('google.rpc.Status').decode(trailer).details : [];
  const info = details.find((detail) => detail.type_url.endsWith('google.rpc.ErrorInfo'));
  return info && rpc.lookupType('google.rpc.ErrorInfo').decode(info.value);
}

const [address, adapter, prompt] = process.argv.slice(2);
const client = new InferenceService(address, grpc.credentials.createInsecure());
const request = {
  adapter,
  chat: { messages: [{ role: 'user', content: prompt }] },
  stopping: { max_tokens: 256 },
};
const call = client.GenerateStream(request, { deadline: Date.now() + 60_000 });
try {
  for await (const response of call) {
    if (response.event === 'chunk') process.stdout.write(response.chunk.text);
    if (response.event === 'finished') {
      const { usage, finish_reason: reason, worker_id: worker } = response.finished;
      process.stdout.write('\n');
      console.error(`${usage.output_tokens} tokens, ${reason}, worker ${worker}`);
    }
  }
} catch (error) {
  const info = error.metadata && errorInfo(error);
  console.error(`${grpc.status[error.code] ?? 'error'}: ${error.details ?? error.message}`);
  if (info) console.error(`${info.reason} ${JSON.stringify(info.metadata)}`);
  process.exitCode = 1;
} finally {
  call.cancel(); // nothing happens if it has ended
  client.close();
}
