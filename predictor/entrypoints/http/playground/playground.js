// The page to talk to the model. Whatever a model writes is shown as text, never as HTML.

import { readEvents } from "./events.js";
import { EXAMPLE_SCHEMA, EXAMPLE_TOOLS } from "./examples.js";
import { snippet } from "./snippets.js";

const POLL_LOADING_MS = 1000;
const POLL_READY_MS = 15000;

const element = (id) => document.getElementById(id);
const server = { name: "", task: "generate", chats: true, key: sessionStorage.getItem("key") ?? "" };
let messages = []; // as in a request, without the system prompt
let running = null; // AbortController of the request in progress

// Requests

function headers() {
  return { "Content-Type": "application/json", ...(server.key && { Authorization: `Bearer ${server.key}` }) };
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  const body = await response.json();
  if (!response.ok) throw new ServerError(response, body);
  return body;
}

class ServerError extends Error {
  constructor(response, body) {
    const wait = response.headers.get("Retry-After");
    const reason = body?.error?.message ?? body?.error ?? response.statusText;
    super(`${response.status}: ${reason}${wait ? ` Retry after ${wait} s.` : ""}`);
    this.status = response.status;
  }
}

function parsed(id) {
  const text = element(id).value.trim();
  if (!text) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    element(id).closest("details").open = true;
    element(id).focus();
    throw new Error(`${element(id).labels[0].textContent}: ${error.message}`);
  }
}

function number(id) {
  const { value } = element(id);
  return value === "" ? undefined : Number(value);
}

function requestBody() {
  const sampling = {
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
  };
  if (!server.chats) return { model: server.name, prompt: messages.at(-1)?.content ?? "", ...sampling };
  const system = element("system").value.trim();
  const schema = parsed("schema");
  return {
    model: server.name,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    ...sampling,
    tools: parsed("tools"),
    response_format: schema && { type: "json_schema", json_schema: { name: "answer", schema } },
  };
}

const route = () => (server.chats ? "v1/chat/completions" : "v1/completions");

async function generate() {
  let body;
  try {
    body = requestBody();
  } catch (error) {
    showError(error);
    return;
  }
  const answer = new Answer();
  running = new AbortController();
  setButtons();
  try {
    const response = await fetch(route(), {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal: running.signal,
    });
    if (!response.ok) throw new ServerError(response, await response.json());
    for await (const event of readEvents(response.body)) answer.add(event);
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
    if (error.status === 401) askForKey();
  } finally {
    running = null;
    answer.finish();
    setButtons();
  }
}

// Messages

function show(role, content = "") {
  const article = element("message").content.cloneNode(true).firstElementChild;
  article.classList.add(role);
  article.querySelector("h2").textContent = role;
  article.querySelector(".content").textContent = content;
  element("messages").append(article);
  scrollDown();
  return article;
}

function showError(error) {
  show("error", error.message).setAttribute("role", "alert");
}

// On a phone the page scrolls, on a desktop the messages do.
function scrollDown() {
  element("messages").lastElementChild?.scrollIntoView({ block: "end" });
}

// The answer that a stream brings, and its figures.
class Answer {
  constructor() {
    this.article = show("assistant");
    this.chat = messages; // not those of a new chat that ends this answer
    this.message = { role: "assistant", content: "" };
    this.started = performance.now();
    this.first = this.last = this.usage = null;
    this.finishReason = "stopped";
  }

  add(event) {
    if (event.error) throw new Error(event.error.message);
    this.usage = event.usage ?? this.usage;
    const [choice] = event.choices;
    if (!choice) return;
    this.finishReason = choice.finish_reason ?? this.finishReason;
    const delta = choice.delta ?? { content: choice.text };
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (delta.reasoning_content) {
      const reasoning = this.article.querySelector(".reasoning");
      reasoning.hidden = false;
      reasoning.querySelector(".text").append(delta.reasoning_content);
    }
    if (delta.content) {
      this.message.content += delta.content;
      this.article.querySelector(".content").append(delta.content);
    }
    for (const part of delta.tool_calls ?? []) this.addCall(part);
    scrollDown();
  }

  addCall({ index, id, function: { name, arguments: text = "" } }) {
    this.message.tool_calls ??= [];
    const calls = this.message.tool_calls;
    if (!calls[index]) {
      calls[index] = { id, type: "function", function: { name, arguments: "" } };
      const call = element("call").content.cloneNode(true).firstElementChild;
      call.querySelector("h3").textContent = name;
      this.article.querySelector(".calls").append(call);
    }
    calls[index].function.arguments += text;
    this.article.querySelectorAll(".calls pre")[index].append(text);
  }

  finish() {
    if (!this.first) {
      this.article.remove();
      return;
    }
    this.chat.push(this.message);
    const seconds = (this.last - this.first) / 1000;
    const figures = [
      this.usage && `${this.usage.prompt_tokens} + ${this.usage.completion_tokens} tokens`,
      `first token ${Math.round(this.first - this.started)} ms`,
      this.usage?.completion_tokens > 1 && seconds > 0 && `${((this.usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`,
      this.finishReason,
    ];
    const paragraph = this.article.querySelector(".figures");
    paragraph.textContent = figures.filter(Boolean).join(" · ");
    paragraph.hidden = false;
    if (this.message.tool_calls) this.askForResults();
    scrollDown();
  }

  askForResults() {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Send results";
    button.addEventListener("click", () => {
      button.remove();
      const results = [...this.article.querySelectorAll(".calls textarea")].map((area) => area.value);
      for (const [index, content] of results.entries()) {
        messages.push({ role: "tool", tool_call_id: this.message.tool_calls[index].id, content });
        show("tool", content);
      }
      generate();
    });
    this.article.querySelector(".calls").append(button);
  }
}

function send(event) {
  event?.preventDefault();
  const text = element("prompt").value;
  if (running || !text.trim()) return;
  element("prompt").value = "";
  messages.push({ role: "user", content: text });
  show("user", text);
  generate();
}

function regenerate() {
  const last = messages.findLastIndex((message) => message.role === "user");
  if (running || last < 0) return;
  messages = messages.slice(0, last + 1);
  const articles = [...element("messages").children];
  const shown = articles.findLastIndex((article) => article.classList.contains("user"));
  for (const article of articles.slice(shown + 1)) article.remove();
  generate();
}

function newChat() {
  running?.abort();
  messages = [];
  element("messages").replaceChildren();
  element("prompt").focus();
  setButtons();
}

function setButtons() {
  element("send").disabled = Boolean(running);
  element("stop").disabled = !running;
  element("regenerate").disabled = Boolean(running) || !messages.some((message) => message.role === "user");
  showCode();
}

// The server

function askForKey() {
  element("key-form").hidden = false;
  element("key").focus();
}

async function describe() {
  try {
    const { data } = await get("v1/models");
    server.name = data[0].id;
    const { properties } = await get(`v2/models/${encodeURIComponent(server.name)}`);
    server.task = properties.task ?? "generate";
    server.chats = properties.chat_template !== "none";
    showFacts(properties);
    element("key-form").hidden = true;
  } catch (error) {
    if (error.status !== 401) throw error;
    askForKey();
    if (server.key) showError(error);
  }
}

function showFacts(properties) {
  element("model").textContent = document.title = server.name;
  element("facts").replaceChildren();
  for (const [name, value] of Object.entries(properties)) {
    if (value === "") continue;
    const [term, definition] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name.replaceAll("_", " ");
    definition.textContent = value;
    element("facts").append(term, definition);
  }
  element("composer").hidden = server.task !== "generate";
  showCode();
}

function setStatus(state, text) {
  element("status").dataset.state = state;
  element("status").textContent = text;
}

async function watch() {
  let ready = false;
  try {
    const response = await fetch("v2/health/ready");
    ready = response.ok;
    if (!ready) setStatus("loading", (await response.json()).error);
    else {
      // A request needs the model's name.
      if (!element("facts").childElementCount && element("key-form").hidden) await describe();
      setStatus("ready", "ready");
    }
  } catch (error) {
    setStatus("error", error instanceof ServerError ? error.message : "The server does not answer.");
  }
  setTimeout(watch, ready ? POLL_READY_MS : POLL_LOADING_MS);
}

function showCode() {
  if (!element("code-details").open) return;
  try {
    const base = new URL(".", location.href).href.replace(/\/$/, "");
    const code = snippet(element("language").value, base, server.task, requestBody());
    element("code").textContent = code;
  } catch (error) {
    element("code").textContent = error.message;
  }
}

async function copyCode() {
  const code = element("code");
  getSelection().selectAllChildren(code);
  try {
    await navigator.clipboard.writeText(code.textContent);
    element("copy").textContent = "Copied";
  } catch {
    element("copy").textContent = "Press Ctrl+C";
  }
  setTimeout(() => (element("copy").textContent = "Copy"), 2000);
}

function switchTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
}

// Events

element("composer").addEventListener("submit", send);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
element("stop").addEventListener("click", () => running?.abort());
element("regenerate").addEventListener("click", regenerate);
element("new-chat").addEventListener("click", newChat);
element("theme").addEventListener("click", switchTheme);
element("copy").addEventListener("click", copyCode);
element("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  server.key = element("key").value.trim();
  sessionStorage.setItem("key", server.key);
  await describe().catch(showError);
});
for (const [button, area, example] of [["example-tools", "tools", EXAMPLE_TOOLS], ["example-schema", "schema", EXAMPLE_SCHEMA]]) {
  element(button).addEventListener("click", () => {
    element(area).value = JSON.stringify(example, null, 2);
    showCode();
  });
}
element("code-details").addEventListener("toggle", showCode);
document.querySelector("aside").addEventListener("input", showCode);
watch();
setButtons();
