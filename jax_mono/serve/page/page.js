// The page itself.

const $ = (id) => document.getElementById(id);
const settings = JSON.parse(document.body.dataset.settings);

const EXAMPLES = [
  ["Palindrome", "chat", "Write a Python function that checks whether a string is a palindrome."],
  ["Factorial", "chat", "Write a Python function that returns the factorial of n, with a docstring."],
  // No newline at the end: tokens hold a newline together with the indentation that follows it.
  ["Class", "text", "class Matrix:"],
  ["Function", "text", 'def normalize(x, axis=None):\n    """'],
  ["Test", "text", "import unittest\n\n\nclass TestAddition(unittest.TestCase):"],
  ["Quicksort", "text", 'def quicksort(items):\n    """Returns a sorted copy of a list."""'],
  ["Explain", "chat", "Explain in three sentences what a KV cache is."],
];

// Without randomness, models that were not tuned for conversation soon repeat themselves.
const CONTROLS = [
  { name: "max_tokens", label: "Tokens at most", min: 1, max: Math.min(2048, settings.context), step: 1, value: Math.min(256, settings.context / 2) },
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: settings.chat ? 0 : 0.5 },
  { name: "top_p", label: "Top p", min: 0.05, max: 1, step: 0.05, value: 1 },
  { name: "top_k", label: "Top k (0 is all)", min: 0, max: 200, step: 1, value: 0 },
  { name: "min_p", label: "Min p", min: 0, max: 0.5, step: 0.01, value: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.05, value: settings.chat ? 1 : 1.1 },
];

let running = null;
let lastText = "";
let shownGaps = [];

function facts() {
  const number = (value) => (value >= 1e9 ? `${(value / 1e9).toFixed(2)} B` : `${(value / 1e6).toFixed(0)} M`);
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const chips = [["model", settings.model]];
  if (settings.parameters) chips.push(["parameters", number(settings.parameters)]);
  if (settings.dtype) chips.push(["dtype", settings.dtype]);
  if (settings.batch) chips.push(["batch", settings.batch]);
  if (settings.devices) chips.push(["on", `${plural(settings.devices, "device")} × ${plural(settings.blocks, "block")}`]);
  if (settings.program) chips.push(["program", settings.program]);
  chips.push(["context", settings.context]);
  for (const [name, value] of chips) {
    const chip = document.createElement("li");
    const about = document.createElement("span");
    const bold = document.createElement("b");
    about.textContent = `${name} `;
    bold.textContent = value;
    chip.append(about, bold);
    $("facts").append(chip);
  }
}

function controls() {
  for (const { name, label, value, ...range } of CONTROLS) {
    const box = document.createElement("div");
    const title = document.createElement("label");
    const shown = document.createElement("output");
    const input = Object.assign(document.createElement("input"), { type: "range", id: name, ...range });
    input.value = value;
    title.htmlFor = shown.htmlFor = name;
    shown.textContent = input.value;
    input.addEventListener("input", () => (shown.textContent = input.value));
    title.append(label, shown);
    box.append(title, input);
    $("controls").append(box);
  }
  const box = document.createElement("div");
  const title = Object.assign(document.createElement("label"), { htmlFor: "seed", textContent: "Seed" });
  const input = Object.assign(document.createElement("input"), { type: "number", id: "seed", min: 0, step: 1, placeholder: "drawn" });
  box.append(title, input);
  $("controls").append(box);
}

function examples() {
  for (const [name, mode, prompt] of EXAMPLES) {
    if (mode === "chat" && !settings.chat) continue;
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    button.addEventListener("click", () => {
      $("prompt").value = prompt;
      $(`mode-${mode}`).checked = true;
      $("prompt").focus();
    });
    $("examples").append(button);
  }
}

function request() {
  const body = { model: settings.model };
  for (const { name } of CONTROLS) body[name] = Number($(name).value);
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  Object.assign(body, { stream: true, stream_options: { include_usage: true } });
  if ($("mode-text").checked) return ["/v1/completions", { ...body, prompt: $("prompt").value }];
  return ["/v1/chat/completions", { ...body, messages: [{ role: "user", content: $("prompt").value }] }];
}

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

function showRate(rate) {
  $("rate").textContent = rate ? rate.toFixed(rate < 100 ? 1 : 0) : "–";
  if (!settings.limit_tokens_per_s) return;
  const share = rate / settings.limit_tokens_per_s;
  $("limit").hidden = false;
  $("limit-bar").style.width = `${Math.min(100, 100 * share)}%`;
  $("limit-text").textContent = rate ? `${(100 * share).toFixed(0)} % of ${settings.limit_tokens_per_s.toFixed(0)} tokens/s` : "–";
}

// Tokens as they arrive, and how fast that is. Tokens that come together share the time since those before them.
class Pace {
  constructor() {
    this.started = performance.now();
    this.arrivals = [];
    this.gaps = [];
    this.count = 0;
    this.first = null;
  }

  add(now, tokens) {
    if (!tokens) return;
    if (this.first === null) this.first = now;
    else for (let token = 0; token < tokens; token++) this.gaps.push((now - this.last) / tokens);
    this.last = now;
    this.count += tokens;
    this.arrivals.push([now, this.count]);
  }

  // Over the last second.
  get rate() {
    const end = this.arrivals.at(-1);
    const begin = this.arrivals.find(([time]) => time >= end?.[0] - 1000);
    return begin && end[0] > begin[0] ? (1000 * (end[1] - begin[1])) / (end[0] - begin[0]) : 0;
  }
}

function drawPace(pace) {
  showRate(pace.rate);
  shownGaps = pace.gaps;
  drawSpark($("spark"), shownGaps);
  $("n-tokens").textContent = pace.count;
  $("n-first").textContent = pace.first === null ? "–" : milliseconds(pace.first - pace.started);
  $("gap").textContent = pace.gaps.length ? `median ${milliseconds(median(pace.gaps))}` : "–";
}

async function generate() {
  if (running) return;
  const [path, body] = request();
  if (!$("prompt").value) return complain("Write a prompt first.");
  complain("");
  say("Generating.");
  running = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  const output = $("output");
  output.setAttribute("aria-busy", "true");
  output.classList.add("busy");
  const plain = path === "/v1/completions";
  const answer = new Answer(output, plain);
  const pace = new Pace();
  lastText = plain ? body.prompt : "";
  let timings = null;
  let dirty = true;
  const frame = () => {
    if (dirty) {
      dirty = false;
      answer.show(lastText);
      drawPace(pace);
    }
    if (running) requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  try {
    for await (const [now, record] of records(path, body, $("key").value, running.signal)) {
      const choice = record.choices[0];
      lastText += (plain ? choice?.text : choice?.delta?.content) ?? "";
      pace.add(now, record.tokens);
      timings = record.timings ?? timings;
      if (record.usage) pace.count = record.usage.completion_tokens;
      dirty = true;
    }
    say(`Finished: ${pace.count} tokens at ${(timings?.tokens_per_s ?? pace.rate).toFixed(1)} tokens per second.`);
  } catch (error) {
    if (error.name === "AbortError") say(`Stopped after ${pace.count} tokens.`);
    else {
      complain(error instanceof ServerError ? error.message : `The server cannot be reached: ${error.message}`);
      say("");
    }
  }
  const total = performance.now() - pace.started;
  running = null;
  dirty = false;
  answer.show(lastText);
  drawPace(pace);
  if (timings?.tokens_per_s) showRate(timings.tokens_per_s);
  if (timings) {
    $("n-cached").textContent = timings.cached_tokens;
    drawParts($("stack"), $("parts"), partsOf(timings, total));
  }
  $("spark").setAttribute("aria-label", `Times between tokens: median ${milliseconds(median(pace.gaps))}`);
  output.setAttribute("aria-busy", "false");
  output.classList.remove("busy");
  $("run").disabled = false;
  $("stop").disabled = true;
}

function stop() {
  running?.abort();
}

async function copied(button, text) {
  const before = button.textContent;
  try {
    await toClipboard(text);
    button.textContent = "Copied";
    say("Copied.");
  } catch (error) {
    complain(`Not copied: ${error.message}`);
  }
  setTimeout(() => (button.textContent = before), 1200);
}

facts();
controls();
examples();
showRate(0);
drawSpark($("spark"), shownGaps);
$(settings.chat ? "mode-chat" : "mode-text").checked = true;
$("mode-chat").disabled = !settings.chat;
$("prompt").value = EXAMPLES.find(([, mode]) => settings.chat || mode === "text")[2];
$("keybox").hidden = !settings.keyNeeded;
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => sessionStorage.setItem("key", $("key").value));
$("run").addEventListener("click", generate);
$("stop").addEventListener("click", stop);
$("copy").addEventListener("click", () => copied($("copy"), lastText));
$("curl").addEventListener("click", () => copied($("curl"), asCurl(...request(), settings.keyNeeded)));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  if (event.key === "Escape") stop();
});
window.addEventListener("resize", () => drawSpark($("spark"), shownGaps));
matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => drawSpark($("spark"), shownGaps));
