// ---- roll-outs -----------------------------------------------------------------------------------------------------

function mini(values, name, labels) {
  const label = labels.map((word, k) => `${word} ${number(values[k])}`).join(", ");
  return make("span", { class: "mini", role: "img", "aria-label": label, title: label },
    ...values.map((p) => make("i", { style: { height: `${100 * p}%`, background: color(name) } })));
}

function parts(member, name) {
  if (!data.reward) return "";
  const most = data.reward.w_js + data.reward.w_fmt, width = (x) => `${(100 * x) / most}%`;
  const pieces = member.gold ? [member.reward, 0] : [data.reward.w_js * (1 - member.js), data.reward.w_fmt * member.format];
  return make("span", { class: "stack", role: "img", "aria-label": `reading ${number(pieces[0])}, format ${number(pieces[1])}` },
    ...pieces.map((x) => make("i", { style: { width: width(x), background: color(name) } })));
}

function signed(value, largest, name) {
  const share = Math.min(Math.abs(value) / largest, 1) * 50;
  return make("div", { class: "signed" }, make("i", { style: { width: `${share}%`, left: `${value < 0 ? 50 - share : 50}%`, background: color(name) } }));
}

function member(one, group, largest, index) {
  const name = one.gold ? "human" : group.color;
  return make("tr", {},
    make("th", { scope: "row" }, one.gold ? "curated" : `${index + 1}`),
    make("td", {}, one.readout ? mini(one.readout, name, group.labels) : "–"),
    make("td", { class: "fact" }, Number.isFinite(one.js) ? `JS ${number(one.js, 3)}` : "–", make("br"), Number.isFinite(one.format) ? `format ${one.format}` : ""),
    make("td", {}, Number.isFinite(one.reward) ? number(one.reward, 3) : "–", Number.isFinite(one.reward) ? parts(one, name) : ""),
    make("td", {}, Number.isFinite(one.advantage) ? number(one.advantage, 2) : "–", Number.isFinite(one.advantage) ? signed(one.advantage, largest, name) : ""),
    make("td", {}, one.text ? make("details", {}, make("summary", {}, one.text.split("\n")[0]), ...steps(one.text)) : "the curated trajectory"));
}

function showGroup(group) {
  const largest = Math.max(1e-9, ...group.members.map((one) => Math.abs(one.advantage || 0)));
  const head = ["", "read-out", "", "reward", "advantage", "completion"];
  at("rollout").replaceChildren(make("article", { class: "clip" },
    make("header", {}, make("h3", {}, group.id), make("span", { class: "meta" }, `step ${group.step} · ${group.run}`)),
    make("p", { class: "said" }, group.transcript ? `“${group.transcript}”` : ""),
    group.target ? bars(group.target, [], group.target.indexOf(Math.max(...group.target)), group.labels) : null,
    make("div", { class: "scroll" }, make("table", { class: "members" },
      make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...group.members.map((one, i) => member(one, group, largest, i)))))));
}

if (data.rollouts.length) {
  choose("group", data.rollouts.map((group, i) => [i, `${data.systems.length > 2 ? `${group.run}, ` : ""}step ${group.step}: ${group.id}`]));
  at("group").addEventListener("input", () => showGroup(data.rollouts[Number(at("group").value)]));
  showGroup(data.rollouts[0]);
} else at("rollouts").hidden = true;

// ---- theme, start --------------------------------------------------------------------------------------------------

at("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  redrawAll();
});
DARK.addEventListener("change", redrawAll);
new ResizeObserver(redrawAll).observe(at("clips"));
select();
