"""Complete a prompt with KServe's client over gRPC; the server runs with `--enable_grpc`."""

import asyncio
import os

from kserve import InferenceGRPCClient, InferInput, InferRequest


async def main() -> None:
    """Send the request."""
    client = InferenceGRPCClient(os.environ.get("GRPC_SERVER", "127.0.0.1:8081"))
    question = '[{"role": "user", "content": "What is 17 + 25?"}]'
    messages = InferInput(name="messages", shape=[1], datatype="BYTES", data=[question])
    model = os.environ.get("MODEL", "arithmetic")
    request = InferRequest(model_name=model, infer_inputs=[messages], parameters={"temperature": 0, "max_tokens": 64})
    response = await client.infer(request, headers=[("authorization", f"Bearer {os.environ.get('API_KEY', 'none')}")])
    print(response.outputs[0].data[0].decode())
    await client.close()


asyncio.run(main())
