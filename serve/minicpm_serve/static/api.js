// The server's API, as any other client would use it.

/** The server said no: `status` is HTTP's, `code` and the message are the server's. */
export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

/** The server did not answer at all, or broke off. */
export class Away extends Error {}

async function request(path, { key, ...options } = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Away("The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body?.error);
}

export const health = () => request("health");

/** The model this server has: {id, context_length, …}. */
export async function model(key) {
  return (await (await request("v1/models", { key })).json()).data[0];
}

/** Yields {text}, and at the end {finish, usage}. Ends the generation when `signal` aborts. */
export async function* answer(body, { key, signal }) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    key,
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(response.status, chunk.error);
    const choice = chunk.choices[0];
    yield { text: choice?.delta.content ?? "", finish: choice?.finish_reason ?? null, usage: chunk.usage ?? null };
  }
  throw new Away("The server broke off its answer.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new Away("The server broke off its answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
