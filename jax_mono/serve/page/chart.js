// The sparkline of times between tokens, and the parts of a generation's time.

const SPARK_TOKENS = 160;

function milliseconds(value) {
  if (value >= 10000) return `${(value / 1000).toFixed(1)} s`;
  if (value >= 1000) return `${(value / 1000).toFixed(2)} s`;
  return value >= 10 ? `${value.toFixed(0)} ms` : `${value.toFixed(2)} ms`;
}

function drawSpark(canvas, gaps) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const recent = gaps.slice(-SPARK_TOKENS);
  const middle = median(recent);
  // Twice the median is the top: what is slower touches it.
  const top = Math.max(middle * 2, 1e-6);
  const x = (index) => (recent.length < 2 ? 0 : (index / (recent.length - 1)) * width);
  const y = (gap) => height - 3 - Math.min(1, gap / top) * (height - 10);
  context.strokeStyle = style.getPropertyValue("--line");
  context.lineWidth = 1;
  context.setLineDash([3, 4]);
  context.beginPath();
  context.moveTo(0, y(middle));
  context.lineTo(width, y(middle));
  context.stroke();
  if (recent.length < 2) return;
  context.setLineDash([]);
  const line = new Path2D();
  recent.forEach((gap, index) => line.lineTo(x(index), y(gap)));
  const area = new Path2D(line);
  area.lineTo(width, height);
  area.lineTo(0, height);
  const fill = context.createLinearGradient(0, 0, 0, height);
  fill.addColorStop(0, style.getPropertyValue("--accent"));
  fill.addColorStop(1, "transparent");
  context.globalAlpha = 0.28;
  context.fillStyle = fill;
  context.fill(area);
  context.globalAlpha = 1;
  context.strokeStyle = style.getPropertyValue("--accent");
  context.lineWidth = 1.6;
  context.lineJoin = "round";
  context.stroke(line);
}

function median(values) {
  if (!values.length) return 0;
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(sorted.length / 2)];
}

function partsOf(timings, totalMs) {
  const text = Math.min(timings.text_s, timings.decode_s);
  const known = [
    ["Prompt to tokens", timings.encode_s],
    ["Waiting in line", timings.queue_s],
    ["Reading the prompt", timings.prompt_s],
    ["Decoding", timings.decode_s - text],
    ["Text and sending", text],
  ].map(([name, seconds]) => [name, seconds * 1000]);
  const sum = known.reduce((total, [, value]) => total + value, 0);
  return [...known, ["Network and page", Math.max(0, totalMs - sum)]];
}

function drawParts(stack, table, parts) {
  const total = parts.reduce((sum, [, value]) => sum + value, 0) || 1;
  const bars = [];
  const rows = parts.map(([name, value], index) => {
    const bar = document.createElement("i");
    bar.className = `p${index}`;
    bar.style.flexGrow = String(value / total);
    bars.push(bar);
    const dot = document.createElement("i");
    dot.className = `dot p${index}`;
    const row = document.createElement("tr");
    const label = document.createElement("th");
    label.scope = "row";
    label.append(dot, name);
    const time = document.createElement("td");
    time.textContent = milliseconds(value);
    const share = document.createElement("td");
    share.className = "share";
    share.textContent = `${((100 * value) / total).toFixed(1)} %`;
    row.append(label, time, share);
    return row;
  });
  stack.replaceChildren(...bars);
  table.replaceChildren(...rows);
}
