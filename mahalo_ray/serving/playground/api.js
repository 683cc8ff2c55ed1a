// Talking to the server: requests, streams, and errors in words that need no knowledge of HTTP.

/** `kind`: what the page can do about it ("key", "full", "busy", "network", "stopped" or "other"). */
export class ServerError extends Error {
  constructor(message, kind = "other") {
    super(message);
    this.kind = kind;
  }
}

let apiKey = "";
export function useKey(key) {
  apiKey = key;
}

function headers(body) {
  const sent = {};
  if (apiKey) sent.Authorization = "Bearer " + apiKey;
  if (body) sent["Content-Type"] = "application/json";
  return sent;
}

async function send(path, body, signal) {
  try {
    return await fetch(path, {
      method: body ? "POST" : "GET", headers: headers(body), body: body && JSON.stringify(body), signal,
    });
  } catch (error) {
    throw interrupted(error, signal);
  }
}

function interrupted(error, signal) {
  if (error instanceof ServerError) return error;
  if (signal && signal.aborted) return new ServerError("You stopped this answer.", "stopped");
  return new ServerError("The server cannot be reached. Is it still running, and are you still connected?", "network");
}

/** The error that an answer of status other than 200, or an event of a stream, stands for. */
export function explained(status, details, retryAfter) {
  const {code, param, message} = details ?? {};
  const later = retryAfter ? " Try again in " + (retryAfter === "1" ? "a second." : retryAfter + " seconds.") : " Try again in a moment.";
  if (code === "missing_api_key") return new ServerError("This server needs a key. Enter it in the field at the top.", "key");
  if (status === 401) return new ServerError("The server does not accept this key. Check it and enter it again.", "key");
  if (code === "context_length_exceeded") {
    return new ServerError("This conversation has become too long for the model. Start a new one to go on.", "full");
  }
  if (status === 400 && param === "messages" && /limit/.test(message ?? "")) {
    return new ServerError("This conversation has as many messages as the server allows. Start a new one to go on.", "full");
  }
  if (code === "overloaded") return new ServerError("The model is busy with other questions." + later, "busy");
  if (status === 429) return new ServerError("You have asked more often than this server allows." + later, "busy");
  if (code === "shutting_down") return new ServerError("The server is being stopped or replaced." + later, "busy");
  if (code === "timeout" || status === 504) {
    return new ServerError("The answer took longer than the server allows. Try again, or ask for fewer candidates.", "busy");
  }
  if (status === 413) return new ServerError("This message is longer than the server accepts. Shorten it.");
  if (status >= 500 && status !== 500) return new ServerError("The model cannot answer right now." + later, "busy");
  if (status === 500) {
    const reference = /error \w+/.exec(message ?? "");
    return new ServerError("Something went wrong in the server." +
      (reference ? " Who runs it finds the reason in its log under \u2018" + reference[0] + "\u2019." : ""));
  }
  if (!message) return new ServerError("The server answered with status " + status + ", which this page cannot read.");
  const sentence = message[0].toUpperCase() + message.slice(1);
  return new ServerError("The server did not accept this: " + sentence + (/[.!?]$/.test(sentence) ? "" : "."));
}

async function refusal(response) {
  let details = null;
  try {
    details = (await response.json()).error;
  } catch { /* not JSON: only the status is known */ }
  return explained(response.status, details, response.headers.get("Retry-After"));
}

/** The JSON that answers a body. */
export async function post(path, body, signal) {
  const response = await send(path, body, signal);
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** The JSON at an address; null where the server has nothing there (404) and `optional` is set. */
export async function get(path, {optional = false} = {}) {
  const response = await send(path);
  if (optional && response.status === 404) return null;
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/**
 * Stream one answer. `onText(text)` gets the whole text so far whenever it grows. Resolves to
 * {text, report, finish}; a ServerError carries the text so far in `text`.
 */
export async function streamAnswer(body, signal, onText) {
  let text = "", report = null, finish = null;
  const steps = [];
  try {
    const response = await send("v1/chat/completions", {...body, stream: true}, signal);
    if (!response.ok) throw await refusal(response);
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw explained(chunk.error.type === "server_error" ? 503 : 400, chunk.error);
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) onText(text += choice.delta.content);
      if (choice?.finish_reason) finish = choice.finish_reason;
      if (chunk.mahalo?.steps) report = chunk.mahalo;
      else if (chunk.mahalo) steps.push(chunk.mahalo);
    }
    if (finish === null) throw new ServerError("The answer broke off: the connection to the server was lost.", "network");
    return {text, report, finish};
  } catch (error) {
    throw Object.assign(interrupted(error, signal), {text, steps});
  }
}

/** The parsed `data:` lines of a stream of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
