// Talking to the server.

class ServerError extends Error {}

function headers(key) {
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

// Yields the records of a stream as they arrive: [time in ms, record].
async function* records(path, body, key, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  if (!response.ok) {
    const found = await response.json().catch(() => null);
    throw new ServerError(found?.error?.message ?? `the server answered ${response.status}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const now = performance.now();
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const record = JSON.parse(event.slice(6));
      if (record.error) throw new ServerError(record.error.message);
      yield [now, record];
    }
  }
}

function asCurl(path, body, keyNeeded) {
  const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const key = keyNeeded ? ` \\\n  -H "Authorization: Bearer $JAX_MONO_API_KEY"` : "";
  return (
    `curl -N ${quote(location.origin + path)} \\\n  -H 'Content-Type: application/json'${key} \\\n` +
    `  -d ${quote(JSON.stringify(body))}`
  );
}

async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // pages that are not from this machine have no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser refused");
}
