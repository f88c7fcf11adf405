// Command client streams one answer: `client HOST:PORT ADAPTER PROMPT` ("" is the base model).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	commonv1 "calumma.example/client/gen/calumma/common/v1"
	gatewayv1 "calumma.example/client/gen/calumma/gateway/v1"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: client HOST:PORT ADAPTER PROMPT")
		os.Exit(2)
	}
	if err := generate(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		explain(err)
		os.Exit(1)
	}
}

func generate(address, adapter, prompt string) error {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := gatewayv1.NewInferenceServiceClient(conn).GenerateStream(ctx,
		&gatewayv1.GenerateStreamRequest{
			Adapter: adapter,
			Input: &gatewayv1.GenerateStreamRequest_Chat{Chat: &gatewayv1.ChatMessages{
				Messages: []*gatewayv1.ChatMessage{{Role: "user", Content: prompt}},
			}},
			Stopping: &commonv1.StopConditions{MaxTokens: proto.Int32(256)},
		})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch event := response.Event.(type) {
		case *gatewayv1.GenerateStreamResponse_Chunk:
			fmt.Print(event.Chunk.Text)
		case *gatewayv1.GenerateStreamResponse_Finished:
			fmt.Fprintf(os.Stderr, "\n%d tokens\n", event.Finished.Usage.OutputTokens)
		}
	}
}

// explain prints the status and the stable reason, for example ADAPTER_NOT_FOUND.
func explain(err error) {
	state := status.Convert(err)
	fmt.Fprintf(os.Stderr, "%s: %s\n", state.Code(), state.Message())
	for _, detail := range state.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			fmt.Fprintln(os.Stderr, info.Reason, info.Metadata)
		}
	}
}
