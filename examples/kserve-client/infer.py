"""Complete prompts in one batch with KServe's client, over the Open Inference Protocol v2."""

import asyncio
import os

from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig


async def main() -> None:
    """Send the request."""
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    server = os.environ.get("SERVER", "http://127.0.0.1:8080")
    headers = {"Authorization": f"Bearer {os.environ.get('API_KEY', 'none')}"}
    questions = ['[{"role": "user", "content": "What is 17 + 25?"}]', '[{"role": "user", "content": "Who are you?"}]']
    messages = InferInput(name="messages", shape=[len(questions)], datatype="BYTES", data=questions)
    model = os.environ.get("MODEL", "arithmetic")
    request = InferRequest(model_name=model, infer_inputs=[messages], parameters={"temperature": 0, "max_tokens": 64})
    response = await client.infer(server, request, model_name=model, headers=headers)
    for answer in response.outputs[0].data:
        print(answer)
    await client.close()


asyncio.run(main())
