// The clips and roll-outs of the report. What models and corpora wrote is untrusted and only ever set as text.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 12;
const DARK = matchMedia("(prefers-color-scheme: dark)");
const at = (id) => document.getElementById(id);
const color = (name) => `var(--${name})`;
const resolved = (name) => { // a canvas needs the colour itself
  const probe = document.createElement("i");
  probe.style.color = color(name);
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
};

// An element with attributes and children; strings become text, never markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
const dot = (name) => make("span", { class: `dot ${name}` });
const number = (x, digits = 2) => (Number.isFinite(x) ? x.toFixed(digits) : "–");
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// ---- sound ---------------------------------------------------------------------------------------------------------

const player = new Audio();
let playing = null; // {clip, redraw, button, clock}: the card the player belongs to

function drawWave(canvas, clip, heard) {
  const peaks = bytes(clip.peaks), scale = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d"), done = resolved("trained0"), rest = resolved("muted");
  pen.scale(scale, scale);
  const count = Math.min(peaks.length, Math.floor(width / 3)), step = width / count;
  for (let i = 0; i < count; i++) {
    const from = Math.floor((i * peaks.length) / count), to = Math.max(from + 1, Math.floor(((i + 1) * peaks.length) / count));
    const tall = Math.max(1.5, (Math.max(...peaks.subarray(from, to)) / 255) * (height - 4));
    pen.globalAlpha = i / count < heard ? 1 : 0.55;
    pen.fillStyle = i / count < heard ? done : rest;
    pen.fillRect(i * step, (height - tall) / 2, Math.max(1, step - 1), tall);
  }
}

// From quiet to loud: the page's own colours, so that both themes look right.
const RAMPS = { light: [[246, 248, 250], [168, 205, 230], [46, 128, 186], [10, 50, 98]], dark: [[22, 27, 34], [16, 66, 110], [64, 150, 210], [226, 241, 252]] };
const isDark = () => (document.documentElement.dataset.theme || (DARK.matches ? "dark" : "light")) === "dark";

function drawMel(canvas, clip) {
  const values = bytes(clip.mel), ramp = isDark() ? RAMPS.dark : RAMPS.light;
  canvas.width = clip.columns;
  canvas.height = clip.bands;
  const pen = canvas.getContext("2d"), image = pen.createImageData(clip.columns, clip.bands);
  values.forEach((value, i) => {
    const x = i % clip.columns, y = clip.bands - 1 - Math.floor(i / clip.columns), t = (value / 255) * 3, low = Math.min(2, Math.floor(t));
    const rgb = ramp[low].map((channel, c) => channel + (ramp[low + 1][c] - channel) * (t - low));
    image.data.set([...rgb, 255], 4 * (y * clip.columns + x));
  });
  pen.putImageData(image, 0, 0);
}

const clock = (seconds) => `${seconds.toFixed(1)} s`;
const heard = (clip) => (playing && playing.clip === clip ? player.currentTime / clip.seconds : 0);

function sound(clip) {
  if (!clip.peaks) return make("p", { class: "silence" }, `No sound: ${clip.silence}`);
  const wave = make("canvas", { class: "wave", role: "slider", tabindex: "0", "aria-label": `Position in ${clip.id}`, "aria-valuemin": "0", "aria-valuemax": clip.seconds });
  const mel = make("canvas", { class: "mel", role: "img", "aria-label": `Log-mel spectrogram of ${clip.id}` });
  const button = make("button", { class: "play", type: "button", "aria-label": `Play ${clip.id}` }, "▶");
  const position = make("span", {}, "0.0 s");
  const redraw = () => {
    drawWave(wave, clip, heard(clip));
    wave.setAttribute("aria-valuenow", (heard(clip) * clip.seconds).toFixed(1));
    position.textContent = clock(heard(clip) * clip.seconds);
    const on = playing && playing.clip === clip && !player.paused;
    button.textContent = on ? "❚❚" : "▶";
    button.setAttribute("aria-label", `${on ? "Pause" : "Play"} ${clip.id}`);
  };
  const mine = { clip, redraw, position };
  const claim = () => {
    if (playing && playing.clip === clip) return;
    const before = playing;
    playing = mine;
    player.src = clip.audio;
    if (before) before.redraw();
  };
  const toggle = () => {
    claim();
    if (player.paused) player.play().catch((error) => { position.textContent = `cannot play: ${error.message}`; });
    else player.pause();
  };
  const seek = (seconds) => {
    claim();
    player.currentTime = Math.min(Math.max(seconds, 0), clip.seconds);
    redraw();
  };
  const point = (event) => { seek((event.offsetX / event.target.clientWidth) * clip.seconds); if (player.paused) toggle(); };
  button.addEventListener("click", toggle);
  wave.addEventListener("click", point);
  mel.addEventListener("click", point);
  wave.addEventListener("keydown", (event) => {
    if (event.key === " ") toggle();
    else if (event.key === "ArrowRight") seek(heard(clip) * clip.seconds + 0.2);
    else if (event.key === "ArrowLeft") seek(heard(clip) * clip.seconds - 0.2);
    else return;
    event.preventDefault();
  });
  if (playing && playing.clip === clip) playing = mine; // the card was drawn again
  drawers.set(wave, () => { redraw(); drawMel(mel, clip); });
  const ends = make("div", { class: "time" }, position, make("span", {}, clock(clip.seconds)));
  return make("div", { class: "sound" }, button, wave, mel, ends);
}
for (const event of ["play", "pause", "ended", "timeupdate"]) player.addEventListener(event, () => playing && playing.redraw());
player.addEventListener("error", () => { if (playing) playing.position.textContent = "the sound file is not where it was"; });

// Pictures are drawn once they are in the page, and again when its width or the theme changes.
const drawers = new Map();
function redrawAll() {
  for (const [canvas, draw] of drawers) {
    if (canvas.isConnected) draw();
    else drawers.delete(canvas);
  }
}

// ---- a clip --------------------------------------------------------------------------------------------------------

const HEADINGS = data.headings, ANCHOR = data.anchor;

// The reasoning as its headed parts, or as it stands where it does not keep the format.
function steps(text) {
  const cut = text.indexOf(ANCHOR), reasoning = cut < 0 ? text : text.slice(0, cut), answer = cut < 0 ? "" : text.slice(cut + ANCHOR.length).trim();
  const starts = HEADINGS.map((heading) => reasoning.indexOf(heading));
  const whole = starts.every((start, i) => start >= 0 && (i === 0 || start > starts[i - 1]));
  const parts = whole
    ? make("dl", { class: "steps" }, ...HEADINGS.flatMap((heading, i) => [
        make("dt", {}, heading.replace(/:$/, "")),
        make("dd", {}, reasoning.slice(starts[i] + heading.length, starts[i + 1]).trim()),
      ]))
    : make("p", { class: "raw" }, reasoning);
  return [parts, answer ? make("p", { class: "raw" }, `${ANCHOR} `, make("span", { class: "answer" }, answer)) : null];
}

function bars(target, rows, majority, labels = data.labels) {
  const shown = [{ name: "annotators", color: "human", values: target }, ...rows].filter((row) => row.values);
  const legend = make("div", { class: "legend" }, ...shown.map((row) => make("span", {}, dot(row.color), row.name)));
  const grid = make("div", { class: "bars", role: "img", "aria-label": shown.map((row) => `${row.name}: ${labels.map((label, k) => `${label} ${number(row.values[k])}`).join(", ")}`).join(". ") });
  labels.forEach((label, k) => {
    grid.append(make("span", { class: k === majority ? "label majority" : "label" }, label), make("span", { class: "track" }, ...shown.map((row) =>
      make("span", { class: "bar" }, make("i", { style: { width: `${84 * row.values[k]}%`, background: color(row.color) } }), row.values[k] >= 0.005 ? number(row.values[k]) : ""))));
  });
  return make("div", {}, legend, grid);
}

const reward = (prediction) => data.reward && data.reward.w_js * (1 - prediction.js) + data.reward.w_fmt * prediction.format;

function thought(system, prediction) {
  if (!prediction) return make("div", { class: "thought" }, make("h4", {}, dot(system.color), system.name), make("p", { class: "silence" }, "not asked about this clip"));
  const facts = [`JS ${number(prediction.js, 3)}`, `${prediction.tokens} tokens`];
  if (data.reward) facts.push(`reward ${number(reward(prediction))}: read-out ${number(data.reward.w_js * (1 - prediction.js))} + format ${number(data.reward.w_fmt * prediction.format)}`);
  return make("div", { class: "thought", style: { "border-top-color": color(system.color) } },
    make("h4", {}, make("b", {}, system.name), ...facts.map((fact) => make("span", {}, fact)),
      prediction.forced ? make("span", { class: "flag" }, "answer forced") : null,
      prediction.format < 1 ? make("span", { class: "flag" }, "not in the format") : null),
    ...steps(prediction.text));
}

function card(clip) {
  const listeners = Object.values(clip.votes).reduce((a, b) => a + b, 0);
  const facts = [`speaker ${clip.speaker}`, clip.gender, `${listeners} votes`, `entropy ${number(clip.entropy)} bits`].filter(Boolean);
  const change = data.systems.flatMap((system, i) => (clip.predictions[i] ? [make("span", { class: "score" }, dot(system.color), number(clip.predictions[i].js))] : []));
  return make("article", { class: "clip", "aria-label": clip.id },
    make("header", {}, make("h3", {}, clip.id), make("span", { class: "meta" }, ...facts.flatMap((fact, i) => [i ? " · " : "", make("bdi", {}, fact)])), make("span", { class: "change" }, "JS", ...change)),
    make("p", { class: "said" }, clip.transcript ? `“${clip.transcript}”` : ""),
    make("div", { class: "halves" }, sound(clip),
      bars(clip.target, data.systems.map((system, i) => ({ ...system, values: clip.predictions[i] && clip.predictions[i].readout })), clip.majority)),
    make("div", { class: "thoughts" }, ...data.systems.map((system, i) => thought(system, clip.predictions[i]))));
}

// ---- sorting, filtering, pages -------------------------------------------------------------------------------------

const choose = (id, options) => at(id).append(...options.map(([value, text]) => make("option", { value }, text)));
const last = data.systems.length - 1;
const SORTS = {
  "js-down": ["JS, worst first", (a, b, i) => jsOf(b, i, -1) - jsOf(a, i, -1)],
  "js-up": ["JS, best first", (a, b, i) => jsOf(a, i, 2) - jsOf(b, i, 2)],
  "entropy-down": ["entropy, most ambiguous first", (a, b) => b.entropy - a.entropy],
  "entropy-up": ["entropy, clearest first", (a, b) => a.entropy - b.entropy],
  class: ["class", (a, b) => a.majority - b.majority],
  speaker: ["speaker", (a, b) => a.speaker.localeCompare(b.speaker)],
  id: ["id", (a, b) => a.id.localeCompare(b.id)],
};
if (data.systems[0].base && last > 0) SORTS.gain = ["gain over base", (a, b, i) => gain(b, i) - gain(a, i)];
const jsOf = (clip, system, missing) => (clip.predictions[system] ? clip.predictions[system].js : missing);
const gain = (clip, system) => (clip.predictions[0] && clip.predictions[system] ? clip.predictions[0].js - clip.predictions[system].js : -9);
for (const clip of data.clips) clip.words = [clip.id, clip.transcript, clip.speaker, ...clip.predictions.map((p) => (p ? p.text : ""))].join("\n").toLowerCase();

let shown = data.clips, page = 0;
const limit = (id, otherwise) => (at(id).value === "" ? otherwise : Number(at(id).value));

function select() {
  const system = Number(at("system").value), wanted = at("find").value.trim().toLowerCase();
  const [jsLeast, jsMost] = [limit("js-least", -1), limit("js-most", 2)], [least, most] = [limit("entropy-least", -1), limit("entropy-most", 99)];
  shown = data.clips.filter((clip) =>
    (at("class").value === "" || clip.majority === Number(at("class").value)) &&
    (at("speaker").value === "" || clip.speaker === at("speaker").value) &&
    jsOf(clip, system, 0) >= jsLeast && jsOf(clip, system, 0) <= jsMost && clip.entropy >= least && clip.entropy <= most &&
    clip.words.includes(wanted));
  shown.sort((a, b) => SORTS[at("sort").value][1](a, b, system) || (a.id < b.id ? -1 : 1));
  turn(0);
}

function turn(to) {
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  page = Math.min(Math.max(to, 0), pages - 1);
  const from = page * PER_PAGE, here = shown.slice(from, from + PER_PAGE);
  at("clips").replaceChildren(...here.map(card));
  redrawAll(); // and forgets what has left the page
  at("count").textContent = shown.length ? `${from + 1}–${from + here.length} of ${shown.length} clips` : "No clip fits.";
  for (const id of ["previous", "previous-again"]) at(id).disabled = page === 0;
  for (const id of ["next", "next-again"]) at(id).disabled = page === pages - 1;
}

choose("sort", Object.entries(SORTS).map(([key, [name]]) => [key, name]));
choose("class", [["", "all"], ...data.labels.map((label, k) => [k, label])]);
choose("speaker", [["", "all"], ...[...new Set(data.clips.map((clip) => clip.speaker))].sort().map((name) => [name, name])]);
choose("system", data.systems.map((system, i) => [i, system.name]));
at("system").options[last].defaultSelected = true;
at("system").value = last;
at("tools").addEventListener("input", select);
at("tools").addEventListener("reset", () => setTimeout(select));
at("tools").addEventListener("submit", (event) => event.preventDefault());
for (const suffix of ["", "-again"]) {
  at(`previous${suffix}`).addEventListener("click", () => { turn(page - 1); at("gallery").scrollIntoView(); });
  at(`next${suffix}`).addEventListener("click", () => { turn(page + 1); at("gallery").scrollIntoView(); });
}

// A dot of the scatter plot leads to its clip.
document.querySelectorAll('[id^="points-"]').forEach((group) => {
  const system = Number(group.id.slice("points-".length)), clips = data.clips.filter((clip) => clip.predictions[system]);
  const order = new Map(data.order[system].map((id, i) => [i, id])), known = new Map(clips.map((clip) => [clip.id, clip]));
  group.querySelectorAll("use").forEach((use, i) => {
    const clip = known.get(order.get(i));
    use.classList.add("point");
    use.append(Object.assign(document.createElementNS(use.namespaceURI, "title"), { textContent: `${clip.id}: JS ${number(jsOf(clip, system))}, entropy ${number(clip.entropy)}` }));
    use.addEventListener("click", () => {
      at("tools").reset();
      at("find").value = clip.id;
      select();
      at("gallery").scrollIntoView();
    });
  });
});
