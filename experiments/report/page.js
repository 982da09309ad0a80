"use strict";
const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const list = $("#list"), articles = $$("article"), state = { layer: 0, alike: false };

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "rect"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
const percent = (value) => (value >= 0.1 ? (100 * value).toFixed(0) : (100 * value).toPrecision(2)) + "\u00a0%";

// what an article knows: made when it comes near

const known = new Map();
function about(article) {
  if (!known.has(article)) known.set(article, { stacks: JSON.parse($("script[type='application/json']", article).textContent), maps: new Map(), now: null });
  return known.get(article);
}

// Maps of one caption, [step][group][patch] as bytes of 255ths of the largest of each.
function maps(article, k) {
  const told = about(article);
  if (!told.maps.has(k)) told.maps.set(k, unpack($(`#m${article.dataset.n}-${k}`).textContent, told.stacks[k]));
  return told.maps.get(k);
}
async function unpack(text, stack) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const buffer = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  const steps = stack.curve.length, groups = stack.layers.length, patches = stack.grid[0] * stack.grid[1], each = steps * groups;
  return {
    patches, groups,
    largest: new Float32Array(buffer, 0, each),
    sums: new Float32Array(buffer, 4 * each, each),
    weights: new Uint8Array(buffer, 8 * each, each * patches),
    left: new Uint8Array(buffer, 8 * each + each * patches),
  };
}

// Attention and what was left at a step (from 0): of one group of layers, or the mean of all (layer 0).
function at(data, stack, step, layer) {
  const groups = layer ? [layer - 1] : stack.layers.map((_, g) => g), all = groups.reduce((sum, g) => sum + stack.layers[g], 0);
  const attention = new Float32Array(data.patches), left = new Float32Array(data.patches), event = stack.left.findLastIndex((first) => first <= step + 1);
  let sum = 0;
  for (const g of groups) {
    const share = stack.layers[g] / all, place = step * data.groups + g;
    sum += share * data.sums[place];
    for (let p = 0; p < data.patches; p++) {
      attention[p] += (share * data.largest[place] * data.weights[place * data.patches + p]) / 255;
      left[p] += (share * data.left[(event * data.groups + g) * data.patches + p]) / 255;
    }
  }
  return { attention, left, sum };
}

function highest(data, stack, layer) {
  data.highest ??= [];
  return (data.highest[layer] ??= Math.max(...stack.curve.map((_, step) => Math.max(...at(data, stack, step, layer).attention))));
}

// A ramp from dark red to pale yellow, brighter where there is more, for any eye; level in [0, 1].
const RAMP = [[60, 16, 20, 0], [217, 72, 15, 0.75], [255, 212, 59, 0.9], [255, 249, 219, 0.96]];
function colour(level) {
  const place = Math.min(level, 0.9999) * 3, i = Math.floor(place), f = place - i;
  const [r, g, b, a] = RAMP[i].map((low, c) => low + f * (RAMP[i + 1][c] - low));
  return `rgba(${r}, ${g}, ${b}, ${a})`;
}

const CELL = 8;
function paint(canvas, found, rows, columns, top) {
  canvas.width = columns * CELL;
  canvas.height = rows * CELL;
  const pen = canvas.getContext("2d");
  for (let p = 0; p < rows * columns; p++) {
    const x = (p % columns) * CELL, y = Math.floor(p / columns) * CELL;
    if (found.left[p] < 0.999) {
      pen.fillStyle = `rgba(128, 128, 128, ${0.66 * (1 - found.left[p])})`;
      pen.fillRect(x, y, CELL, CELL);
    }
    if (top > 0 && found.attention[p] > 0) {
      pen.fillStyle = colour(found.attention[p] / top);
      pen.fillRect(x, y, CELL, CELL);
    }
  }
}

// the word that is pointed at

async function show(word) {
  const article = word.closest("article"), section = word.closest(".stack"), told = about(article), k = +section.dataset.k, stack = told.stacks[k], step = +word.dataset.t;
  fill(article);
  if (told.now) told.now.setAttribute("aria-pressed", "false");
  told.now = word;
  word.setAttribute("aria-pressed", "true");
  rove(word);
  $$(".time", article).forEach((time, i) => cursor(time, i === k ? step + 1 : 0));
  const mine = (told.turn = (told.turn ?? 0) + 1), groups = stack.layers.length, layer = Math.min(state.layer, groups), name = layerName(stack, layer);
  $(".control output", article).value = name;
  const facts = [`${section.querySelector("h4").textContent}, “${word.textContent}”${word.closest("mark.false") ? ", hallucinated" : word.closest("mark.true") ? ", in the picture" : ""}: step ${step + 1} of ${stack.curve.length}, ${name}.`];
  if (Array.isArray(stack.grid)) {
    const data = await maps(article, k);
    if (mine !== told.turn) return; // another word has been pointed at meanwhile
    const [rows, columns, [x, y, w, h]] = stack.grid, found = at(data, stack, step, layer), most = Math.max(...found.attention);
    let top = most;
    if (state.alike) top = highest(data, stack, layer);
    const frame = $(".frame", article);
    let canvas = $("canvas", frame);
    if (!canvas) {
      canvas = make("canvas", { role: "img" });
      frame.append(canvas);
    }
    Object.assign(canvas.style, { left: 100 * x + "%", top: 100 * y + "%", width: 100 * w + "%", height: 100 * h + "%" });
    frame.classList.add("on");
    paint(canvas, found, rows, columns, top);
    const count = found.left.reduce((sum, v) => sum + v, 0), peak = found.attention.indexOf(most);
    canvas.setAttribute("aria-label", `attention over the picture: most at row ${Math.floor(peak / columns) + 1} of ${rows}, column ${(peak % columns) + 1} of ${columns}`);
    $(".bar span", article).textContent = percent(top);
    facts.push(`${percent(found.sum)} of the attention is on the picture, at most ${percent(most)} on one patch; ${Math.round(count)} of ${data.patches} patches left.`);
  } else facts.push(stack.grid + ".");
  $(".facts", article).textContent = facts.join(" ");
}
function layerName(stack, layer) {
  const total = stack.layers.reduce((sum, n) => sum + n, 0);
  if (!layer) return `mean of ${total} layers`;
  const before = stack.layers.slice(0, layer - 1).reduce((sum, n) => sum + n, 0), size = stack.layers[layer - 1];
  return size > 1 ? `layers ${before + 1} to ${before + size} of ${total}` : `layer ${before + 1} of ${total}`;
}
function rove(word) {
  for (const other of words(word.closest(".stack"))) other.tabIndex = other === word ? 0 : -1;
}
const words = (root) => $$("[data-t]", root);

function setLayer(layer) {
  state.layer = layer;
  for (const control of $$(".control")) {
    const { now, stacks } = about(control.closest("article")), input = $("input", control);
    input.value = layer;
    if (now) show(now);
    else $("output", control).value = layerName(stacks.find((stack) => stack.layers), +input.value);
  }
}

// an article's details, once it is near

function fill(article) {
  if (article.dataset.full) return;
  article.dataset.full = "1";
  const { stacks } = about(article), looked = stacks.filter((stack) => stack.layers), picture = $(".frame img", article);
  if (picture) $(".frame", article).style.maxWidth = `${(65 * picture.getAttribute("width")) / picture.getAttribute("height")}vh`;
  for (const section of $$(".stack", article)) {
    const all = words(section);
    all.forEach((word, i) => {
      word.setAttribute("role", "button");
      word.setAttribute("aria-pressed", "false");
      if (word.closest("mark.false")) word.setAttribute("aria-description", "hallucinated");
      word.tabIndex = i ? -1 : 0;
    });
    timeline($(".time", section), stacks[+section.dataset.k], section);
  }
  if (!looked.length) {
    $(".look", article).append(make("p", { class: "none" }, "No map was made of this picture."));
    return;
  }
  const groups = Math.max(...looked.map((stack) => stack.layers.length));
  const slider = make("input", { type: "range", min: 0, max: groups, value: state.layer, "aria-label": "layer; 0 is the mean of all" });
  const average = make("button", { type: "button" }, "mean");
  slider.addEventListener("input", () => setLayer(+slider.value));
  average.addEventListener("click", () => setLayer(0));
  const drawn = looked.some((stack) => Array.isArray(stack.grid));
  $(".look", article).append(make("p", { class: "facts", "aria-live": "polite" }, "Point at a word, or tap it, to see where the model looked as it chose it."));
  if (drawn) $(".look", article).append(make("div", { class: "control" }, average, slider, make("output", {}, layerName(looked[0], state.layer))), make("div", { class: "bar" }, "0", make("i"), make("span", {}, "most"), make("b"), "dropped"));
}
const near = new IntersectionObserver((entries) => entries.forEach((entry) => entry.isIntersecting && (fill(entry.target), near.unobserve(entry.target))), { rootMargin: "900px" });
articles.forEach((article) => near.observe(article));

// attention by step, with prunes and rollbacks

const HIGH = 64, EDGE = 12;
function timeline(time, stack, section) {
  const { curve, prunes, rollbacks } = stack;
  if (!curve.length) {
    if (prunes.length + rollbacks.length) time.append(make("p", {}, summary(stack)));
    return;
  }
  const svg = make("svg", { role: "img", "aria-label": `Attention per patch left, by step, ${curve.length} steps: ${percent(curve[0])} first, ${percent(curve[curve.length - 1])} last. ${summary(stack)}` });
  time.append(svg, make("p", {}, make("span", {}, `attention per patch left, up to ${percent(Math.max(...curve))}`), make("span", prunes.length ? { class: "p" } : {}, prunes.length ? "▼ " + pruned(stack) : "no prune"), ...(rollbacks.length ? [make("span", { class: "b" }, "↶ " + rolled(stack))] : [])));
  const draw = () => {
    const wide = Math.max(120, time.clientWidth), x = (m) => 4 + ((m - 1) / Math.max(1, curve.length - 1)) * (wide - 8), top = Math.max(...curve, 1e-9), y = (v) => HIGH - 8 - (v / top) * (HIGH - 8 - EDGE);
    const points = curve.map((v, i) => `${x(i + 1).toFixed(1)},${y(v).toFixed(1)}`).join("L");
    svg.setAttribute("viewBox", `0 0 ${wide} ${HIGH}`);
    svg.replaceChildren(make("path", { class: "area", d: `M${x(1)},${HIGH - 8}L${points}L${x(curve.length)},${HIGH - 8}Z` }), make("line", { class: "axis", x1: 0, x2: wide, y1: HIGH - 8, y2: HIGH - 8 }));
    for (const back of rollbacks) {
      const from = x(Math.min(back.at + 1, curve.length)), to = x(Math.min(back.kept + 1, curve.length));
      svg.append(make("line", { class: "back", "data-step": back.at + 1, x1: from, x2: from, y1: 5, y2: HIGH - 8 }), make("path", { class: "back", d: `M${from},5H${to}m4,-3l-4,3l4,3` }));
    }
    for (const prune of prunes) {
      const m = x(prune.step);
      svg.append(make("line", { class: "prune", "data-step": prune.step, x1: m, x2: m, y1: 8, y2: HIGH - 8 }), make("path", { class: "prune", d: `M${m - 5},0h10l-5,8z` }));
    }
    svg.append(make("path", { class: "line", d: "M" + points }));
    for (const word of $$("mark.false [data-t]", section)) svg.append(make("rect", { class: "bad", x: x(+word.dataset.t + 1) - 2, y: HIGH - 6, width: 4, height: 6 }));
    svg.append(make("line", { class: "now", y1: 2, y2: HIGH - 2, visibility: "hidden" }), make("circle", { class: "now", r: 4, visibility: "hidden" }));
    time.place = (m) => [x(m), y(curve[Math.min(m, curve.length) - 1])];
    if (time.dataset.now) cursor(time, +time.dataset.now);
  };
  new ResizeObserver(draw).observe(time);
  draw();
  svg.addEventListener("click", (event) => {
    const m = 1 + ((event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth) * (curve.length - 1);
    const word = words(section).reduce((best, one) => (!best || Math.abs(one.dataset.t - m + 1) < Math.abs(best.dataset.t - m + 1) ? one : best), null);
    if (word) word.focus();
  });
}
function cursor(time, m) {
  time.dataset.now = m || "";
  const marks = $$(".now", time);
  if (!marks.length) return;
  marks.forEach((mark) => mark.setAttribute("visibility", m ? "visible" : "hidden"));
  if (!m) return;
  const [x, y] = time.place(m);
  marks[0].setAttribute("x1", x);
  marks[0].setAttribute("x2", x);
  marks[1].setAttribute("cx", x);
  marks[1].setAttribute("cy", y);
}
const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const pruned = ({ prunes }) => `${many(prunes.length, "prune")} at step ${prunes.map((p) => `${p.step} (${p.kept} left)`).join(", ")}`;
const rolled = ({ rollbacks }) => `${many(rollbacks.length, "rollback")} at step ${rollbacks.map((b) => `${b.at + 1} to ${b.kept + 1}`).join(", ")}`;
const summary = (stack) => [stack.prunes.length ? pruned(stack) : "no prune", ...(stack.rollbacks.length ? [rolled(stack)] : [])].join("; ");

// pointing, tapping and keys

const word = (target) => (target.closest ? target.closest("[data-t]") : null);
list.addEventListener("pointerover", (event) => event.pointerType === "mouse" && word(event.target) && show(word(event.target)));
list.addEventListener("focusin", (event) => word(event.target) && show(word(event.target)));
list.addEventListener("click", (event) => word(event.target) && (word(event.target).focus(), show(word(event.target))));

const shown = () => [...list.children].filter((article) => !article.hidden);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
function go(article) {
  if (!article) return;
  fill(article);
  const head = $("h3", article);
  head.focus({ preventScroll: true });
  article.scrollIntoView({ block: "start", behavior: calm.matches ? "auto" : "smooth" });
}
function nearest() {
  const inside = document.activeElement.closest("article");
  return inside || shown().find((article) => article.getBoundingClientRect().bottom > 80);
}
const MOVES = {
  j: () => { const all = shown(), inside = document.activeElement.closest("article"); go(inside ? all[all.indexOf(inside) + 1] : nearest()); },
  k: () => { const all = shown(), here = nearest(); go(all[all.indexOf(here) - 1]); },
  n: () => false_(1),
  p: () => false_(-1),
  "[": () => step(-1),
  "]": () => step(1),
  0: () => setLayer(0),
  "/": () => $("#find").focus(),
};
function step(by) {
  const article = nearest();
  if (!article) return;
  fill(article);
  const input = $(".control input", article);
  if (input) setLayer(Math.min(Math.max(0, state.layer + by), +input.max));
}
function false_(by) {
  const article = nearest();
  if (!article) return;
  fill(article);
  const all = $$("mark.false [data-t]", article), every = words(article), from = every.indexOf(word(document.activeElement) || about(article).now);
  const next = by > 0 ? all.find((one) => every.indexOf(one) > from) : all.findLast((one) => every.indexOf(one) < (from < 0 ? every.length : from));
  if (next) next.focus();
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target, typing = target.matches("input[type='search'], select"), here = word(target);
  if (here) {
    const section = here.closest(".stack"), mine = words(section), i = mine.indexOf(here), sections = $$(".stack", here.closest("article")).filter((one) => words(one).length), s = sections.indexOf(section);
    const beside = (by) => { const other = sections[s + by] && words(sections[s + by]); return other && other[Math.min(i, other.length - 1)]; };
    const next = { ArrowRight: () => mine[i + 1], ArrowLeft: () => mine[i - 1], Home: () => mine[0], End: () => mine[mine.length - 1], ArrowDown: () => beside(1), ArrowUp: () => beside(-1), Enter: () => here, " ": () => here }[event.key];
    if (next) {
      event.preventDefault();
      const one = next();
      if (one) one === here ? show(one) : one.focus();
      return;
    }
  } else if (event.key === "ArrowRight" && target.matches("h3")) {
    const first = words(target.closest("article"))[0];
    if (first) first.focus();
    return;
  }
  if (!typing && $("#letters").checked && MOVES[event.key]) {
    event.preventDefault();
    MOVES[event.key]();
  }
});

// choosing and ordering

const find = $("#find"), only = $("#only"), order = $("#order");
const facts = articles.map((article, i) => ({ article, i, find: article.dataset.find, id: article.dataset.id, gaps: article.dataset.gaps.split(" ").map(Number), maps: article.querySelector("script[type='text/plain']") !== null }));
function choose() {
  const wanted = find.value.trim().toLowerCase().split(/\s+/).filter(Boolean), [kind, of] = (only ? only.value : "all").split(" ");
  const [by, k] = order.value.split(" "), sign = by === "worst" ? -1 : 1;
  let count = 0;
  for (const one of facts) {
    const fits = { all: true, worse: one.gaps[of] > 0, better: one.gaps[of] < 0, maps: one.maps }[kind] && wanted.every((part) => one.find.includes(part));
    one.article.hidden = !fits;
    count += fits;
  }
  const ordered = [...facts].sort((a, b) => (by === "run" ? 0 : by === "id" ? a.id.localeCompare(b.id, "en", { numeric: true }) : sign * (a.gaps[k] - b.gaps[k])) || a.i - b.i);
  if (ordered.some((one, i) => list.children[i] !== one.article)) list.append(...ordered.map((one) => one.article));
  $("#count").value = `${count} of ${facts.length} pictures`;
}
for (const control of [find, only, order]) if (control) control.addEventListener("input", choose);
$("#alike").addEventListener("change", (event) => {
  state.alike = event.target.checked;
  for (const { now } of known.values()) if (now) show(now);
});
find.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  find.value = "";
  choose();
  find.blur(); // so that letters are keys again
});
$("#choose").addEventListener("submit", (event) => event.preventDefault());
$("#choose").hidden = false;
choose();
if (articles.length) { // the first picture opens at a word, one that is hallucinated if there is any
  fill(articles[0]);
  const first = $("mark.false [data-t]", articles[0]) || $("mark [data-t]", articles[0]) || $("[data-t]", articles[0]);
  if (first) show(first);
}
document.documentElement.dataset.ready = Math.round(performance.now());
