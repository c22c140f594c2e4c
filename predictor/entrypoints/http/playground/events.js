// Server-sent events of a streamed answer.

// Yields the JSON of each event of a response's body, until `[DONE]`.
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue; // a comment: the model is still loading
      const data = line.slice("data: ".length).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
