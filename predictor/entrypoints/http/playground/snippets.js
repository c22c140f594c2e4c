// Code that sends the request of the page. An API key is read from the environment, never written into it.

const POOLING = { embed: ["v1/embeddings", { input: ["A text."] }], classify: ["v1/rerank", { query: "A question?", documents: ["A text."] }] };

export function snippet(language, base, task, generation) {
  const path = generation.messages ? "v1/chat/completions" : "v1/completions";
  const [route, request] = task in POOLING ? [POOLING[task][0], { model: generation.model, ...POOLING[task][1] }] : [path, generation];
  const json = JSON.stringify(request, null, 2);
  if (language === "curl") {
    const quoted = json.replaceAll("'", "'\\''");
    return `curl -s ${base}/${route} \\\n  -H 'Content-Type: application/json' -H "Authorization: Bearer $API_KEY" \\\n  -d '${quoted}'`;
  }
  const text = JSON.stringify(json);
  if (language === "openai" && task !== "classify") {
    const method = { "v1/chat/completions": "chat.completions", "v1/completions": "completions", "v1/embeddings": "embeddings" }[route];
    return `import json, os\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${base}/v1", api_key=os.environ.get("API_KEY", "none"))\nrequest = json.loads(${text})\nprint(client.${method}.create(**request))`;
  }
  return `import json, os, urllib.request\n\nrequest = json.loads(${text})\nheaders = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('API_KEY', '')}"}\nresponse = urllib.request.urlopen(urllib.request.Request("${base}/${route}", json.dumps(request).encode(), headers))\nprint(json.load(response))`;
}
