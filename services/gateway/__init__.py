"""The gateway: what clients call. It owns each request until its last token.

Clients call `InferenceService`; the gateway calls the scheduler (`Submit`), the workers
(`StreamTokens`) and the adapter store (`Watch`, `Get`). It checks and tokenises the prompt,
predicts the output's length, submits, turns tokens back into text, applies stop strings, and
submits again when a worker is lost. It keeps no state that outlives a request.
"""
