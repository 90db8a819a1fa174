// Text from files, people and the model only ever goes into textContent.
"use strict";
const $ = (id) => document.getElementById(id);
const element = (tag, text = "", className = "") => Object.assign(document.createElement(tag), { textContent: text, className });
const HEADINGS = /^(Keywords|Step 1 Text Analysis|Step 2 Audio Analysis|Step 3 Synthesis):\s*/;
const RATE = 16000;
let about, clip = null, votes = null, player = null, recorder = null, run = 0;

async function start() {
  about = await (await fetch("about")).json();
  $("title").textContent = about.title;
  $("transcript").maxLength = about.limits.characters;
  for (const label of about.labels) {
    const bar = element("div", "", "bar"), track = element("div");
    bar.dataset.label = label;
    track.append(element("span", "", "model"), element("span", "", "human"));
    bar.append(element("span", label), track, element("b"));
    $("bars").append(bar);
  }
  about.examples.forEach((example, i) => {
    const button = element("button", example.transcript), strip = element("i");
    const total = Object.values(example.votes).reduce((a, b) => a + b, 0);
    button.type = "button";
    button.title = Object.entries(example.votes).map(([label, n]) => `${label} ${n}`).join(", ");
    Object.values(example.votes).sort((a, b) => b - a).forEach((n, k) => {
      const part = element("b");
      part.style.cssText = `flex:${n / total};opacity:${1 - 0.22 * k}`;
      strip.append(part);
    });
    button.append(strip);
    button.onclick = async () => {
      const blob = await fetch(`examples/${i}`).then((answer) => answer.blob()).catch(gone);
      if (!blob) return;
      $("transcript").value = example.transcript;
      await choose(blob, `example ${i + 1}`, example.votes);
      button.classList.add("chosen");
      listen();
    };
    $("examples").append(button);
  });
  quiet();
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

const GONE = "The demo does not answer; is it still running?";
const gone = () => problem(GONE);

function quiet() {
  $("reasoning").replaceChildren(element("p", "Choose a clip: what the model hears and concludes appears here as it is written.", "empty"));
}

async function choose(blob, name, itsVotes = null) {
  problem("");
  run++;  // whatever is still being written belongs to another clip
  clip = blob;
  votes = itsVotes;
  document.querySelectorAll(".chosen").forEach((b) => b.classList.remove("chosen"));
  $("name").textContent = name;
  $("listen").disabled = $("play").disabled = false;
  if (player) URL.revokeObjectURL(player.src);
  player = new Audio(URL.createObjectURL(blob));
  player.onended = () => ($("play").textContent = "Play");
  $("play").textContent = "Play";
  clear();
  try { draw(await samples(blob)); } catch { draw(new Float32Array(0)); }  // a file only the server can read
}

function clear() {
  for (const bar of document.querySelectorAll(".bar")) show(bar, 0, "");
  $("state").textContent = "";
  $("state").className = $("bars").className = $("reasoning").className = "";
  $("agreement").hidden = $("forced").hidden = true;
  quiet();
  const total = votes ? Object.values(votes).reduce((a, b) => a + b, 0) : 1;
  for (const bar of document.querySelectorAll(".bar"))
    bar.querySelector(".human").style.width = `${100 * ((votes || {})[bar.dataset.label] || 0) / total}%`;
  document.querySelector(".legend .human").hidden = !votes;
}

async function samples(blob) {
  const decoded = await new OfflineAudioContext(1, RATE, RATE).decodeAudioData(await blob.arrayBuffer());
  const mono = new Float32Array(decoded.length);
  for (let c = 0; c < decoded.numberOfChannels; c++)
    decoded.getChannelData(c).forEach((x, i) => (mono[i] += x / decoded.numberOfChannels));
  return mono;
}

function draw(sound) {
  const canvas = $("wave"), pen = canvas.getContext("2d"), { width, height } = canvas, bars = 110;
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = getComputedStyle(canvas).color;
  const peaks = Array.from({ length: bars }, (_, i) => {
    let peak = 0;
    for (let j = Math.floor(i * sound.length / bars); j < (i + 1) * sound.length / bars; j++) peak = Math.max(peak, Math.abs(sound[j]));
    return peak;
  });
  const top = Math.max(...peaks, 1e-3);
  peaks.forEach((peak, i) => {
    const h = Math.max(3, peak / top * height * 0.92), w = width / bars;
    pen.beginPath();
    pen.roundRect(i * w + 1.5, (height - h) / 2, w - 3, h, 3);
    pen.fill();
  });
}

function wav(sound) {  // 16-bit PCM, mono
  const view = new DataView(new ArrayBuffer(44 + 2 * sound.length));
  const text = (at, s) => [...s].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * sound.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * sound.length, true);
  sound.forEach((x, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, x)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

async function record() {
  if (recorder) return recorder.stop();
  problem("");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch {
    return problem("The browser gives no microphone. Allow it for this page, or drop a file instead.");
  }
  const parts = [], began = Date.now();
  recorder = new MediaRecorder(stream);
  const label = $("record").querySelector("span");
  const clock = setInterval(() => {
    const seconds = (Date.now() - began) / 1000;
    label.textContent = `Stop · ${seconds.toFixed(1)} s`;
    if (seconds >= about.limits.seconds - 0.2) recorder.stop();
  }, 100);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = async () => {
    clearInterval(clock);
    stream.getTracks().forEach((track) => track.stop());
    recorder = null;
    $("record").classList.remove("on");
    label.textContent = "Record";
    const sound = await samples(new Blob(parts)).catch(() => null);
    if (!sound?.length) return problem("Nothing was recorded; hold on a little longer.");
    await choose(wav(sound.subarray(0, about.limits.seconds * RATE)), "recording");
    listen();
  };
  $("record").classList.add("on");
  recorder.start();
}

function show(bar, p, text) {
  bar.querySelector(".model").style.width = `${100 * p}%`;
  bar.querySelector("b").textContent = text;
}

function picture(prediction, live) {
  const top = Math.max(...Object.values(prediction.distribution));
  for (const bar of document.querySelectorAll(".bar")) {
    const p = prediction.distribution[bar.dataset.label];
    show(bar, p, `${Math.round(100 * p)} %`);
    bar.classList.toggle("top", p === top);
  }
  $("agreement").hidden = false;
  $("agreement").querySelector("i").style.left = `${100 * prediction.entropy / Math.log2(about.labels.length)}%`;
  $("reasoning").replaceChildren(...prediction.reasoning.split("\n").filter(Boolean).map((line) => {
    const found = line.match(HEADINGS), paragraph = element("p");
    if (found) paragraph.append(element("strong", found[1]));
    paragraph.append(found ? line.slice(found[0].length) : line);
    return paragraph;
  }));
  $("state").textContent = live ? "what it would say now" : `entropy ${prediction.entropy.toFixed(2)} bits`;
  for (const id of ["state", "bars", "reasoning"]) $(id).classList.toggle("live", live);
  $("forced").hidden = live || !prediction.forced;
}

async function listen() {
  if (!clip) return;
  const mine = ++run;
  problem("");
  clear();
  if (clip.size > about.limits.bytes) return problem(`The file is larger than ${about.limits.bytes >> 20} MB; choose a shorter clip.`);
  $("state").textContent = "listening";
  $("state").className = "live";
  try {
    const answer = await fetch(`predict?transcript=${encodeURIComponent($("transcript").value)}`, { method: "POST", body: clip });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "", last = null;
    for (;;) {
      const { value, done } = await reader.read();
      if (mine !== run) return reader.cancel();
      text += value || "";
      const lines = text.split("\n");
      text = lines.pop();
      for (const line of lines.map((l) => JSON.parse(l))) {
        if (line.done) return picture(last, false);
        picture((last = line), true);
      }
      if (done) throw new TypeError("the answer broke off");
    }
  } catch (error) {
    if (mine !== run) return;
    clear();
    problem(error instanceof TypeError ? GONE : error.message);  // fetch and streams name every loss of connection so
  }
}

$("drop").onclick = () => $("file").click();
$("drop").onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); } };
$("file").onchange = async () => {
  const [file] = $("file").files;
  if (file) { await choose(file, file.name); listen(); }
  $("file").value = "";
};
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
  addEventListener(name, async (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    const file = name === "drop" && event.dataTransfer.files[0];
    if (file) { await choose(file, file.name); listen(); }
  });
$("play").onclick = () => {
  const playing = !player.paused;
  playing ? player.pause() : player.play().catch(() => problem("The browser cannot play this file; the model may still hear it."));
  $("play").textContent = playing ? "Play" : "Pause";
};
$("record").onclick = record;
$("listen").onclick = listen;
start().catch(gone);
