"use strict";
// One object per conversation: its turns, its drawing, its sound. Everything shown goes through textContent.
const el = (tag, cls, ...inner) => { const e = document.createElement(tag); if (cls) e.className = cls; e.append(...inner); return e; };
const clock = s => { s = Math.max(0, Math.floor(s)); const h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60, z = String(s % 60).padStart(2, "0");
  return h ? `${h}:${String(m).padStart(2, "0")}:${z}` : `${m}:${z}`; };
let playing = null;                                   // the conversation that is heard

function conversation(section) {
  const $ = q => section.querySelector(q), $$ = q => [...section.querySelectorAll(q)];
  const facts = JSON.parse($(".facts").textContent), audio = $("audio"), detail = $(".detail"), side = $(".side");
  const says = $$(".say"), rows = says.map(s => s.parentNode), blocks = $$(".block"), field = $(".field"), scroll = $(".scroll");
  const head = $(".playhead"), now = $(".now"), play = $(".play"), drawing = $(".drawing");
  let chosen = -1, stop = null, zoom = 1;

  // The time line
  const span = facts.spans, width = facts.width;      // span: [start, end] of each turn in the drawing's unit
  const ticks = $(".axis");
  function stretch(z) {
    const seen = scroll.clientWidth, middle = (scroll.scrollLeft + seen / 2) / (field.clientWidth || 1);
    zoom = Math.min(Math.max(z, 1), Math.max(1, facts.spans.length * 90 / seen));
    field.style.width = zoom > 1 ? `${100 * zoom}%` : "";
    const px = field.clientWidth / width;
    blocks.forEach((b, i) => b.classList.toggle("thin", (span[i][1] - span[i][0]) * px < 7 * facts.labels[facts.emotions[i]].length + 12));
    drawing.classList.toggle("dense", width * px / blocks.length < 5);
    scroll.scrollLeft = middle * field.clientWidth - seen / 2;
    axis(px);
  }
  function axis(px) {
    const steps = facts.timed ? [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600] : [1, 2, 5, 10, 20, 50, 100, 200, 500];
    const step = steps.find(s => s * px >= 64) || steps[steps.length - 1];
    ticks.replaceChildren();
    for (let t = 0; t * px < width * px - 30; t += step) {
      const mark = document.createElementNS(drawing.namespaceURI, "text");
      mark.setAttribute("x", `${100 * t / width}%`); mark.setAttribute("y", drawing.getAttribute("height") - 5);
      mark.textContent = facts.timed ? clock(t) : t + 1; ticks.append(mark);
    }
  }
  const reveal = at => { const x = at / width * field.clientWidth;
    if (zoom > 1 && (x < scroll.scrollLeft + 20 || x > scroll.scrollLeft + scroll.clientWidth - 40)) scroll.scrollLeft = x - scroll.clientWidth / 3; };

  // One turn
  const beside = matchMedia("(min-width: 1000px)");
  function place() {
    if (chosen < 0) return;
    (beside.matches ? side : rows[chosen]).append(detail);
  }
  const chance = (name, p, cls) => { const i = el("i"); i.style.width = `${p}%`;
    return el("div", `chance ${cls}`, el("span", "", name), el("span", "long", i), el("span", "", `${Math.round(p)} %`)); };
  function describe(i) {
    const p = facts.chances[i], order = p.map((_, k) => k).sort((a, b) => p[b] - p[a]);
    detail.replaceChildren(el("h3", "", `Turn ${i + 1}: how sure`), ...order.map(k => chance(facts.labels[k], p[k], facts.colors[k])));
    if (facts.gate) detail.append(el("h4", "", "Whom the gate believes"), ...facts.experts.map((e, k) => chance(e, facts.gate[i][k], `tint ${facts.tints[k]}`)));
    if (facts.experts.length) detail.append(el("h4", "", "What each expert says"),
      ...facts.experts.map((e, k) => { const c = facts.says[k][i];
        return el("div", "says", el("span", "", e), c === null ? el("span", "meta", "absent") : el("b", `pill ${facts.colors[c]}`, facts.labels[c])); }));
    detail.hidden = false; side.classList.add("chosen"); place();
  }
  function choose(i, focus, show = true) {
    if (i < 0 || i >= says.length) return;
    if (chosen >= 0) { rows[chosen].classList.remove("chosen"); blocks[chosen].classList.remove("chosen"); says[chosen].tabIndex = -1; says[chosen].removeAttribute("aria-current"); }
    chosen = i; rows[i].classList.add("chosen"); blocks[i].classList.add("chosen"); says[i].tabIndex = 0; says[i].setAttribute("aria-current", "true");
    reveal(span[i][0]);
    if (show) describe(i);
    if (focus) { says[i].focus({preventScroll: true}); }
    if (focus || show) follow(says[i]);
  }
  function follow(row) {
    const deck = $(".deck"), top = getComputedStyle(deck).position === "sticky" ? deck.getBoundingClientRect().bottom : 0, box = row.getBoundingClientRect();
    if (box.top < top + 8) scrollBy({top: box.top - top - 60}); else if (box.bottom > innerHeight - 24) scrollBy({top: box.bottom - innerHeight + 120});
  }
  const next = (i, by) => { for (let k = i + by; k >= 0 && k < rows.length; k += by) if (!rows[k].classList.contains("dim")) return k; return i; };

  // The sound
  function hear(i) {                                  // this turn alone; again: pause
    if (!audio || !facts.heard[i]) return;
    if (!audio.paused && stop === facts.heard[i][1]) return audio.pause();
    const [from, to] = facts.heard[i];
    stop = to; start(from);
  }
  function start(at) {
    if (playing && playing !== audio) playing.pause();
    playing = audio;
    if (at !== undefined) audio.currentTime = at;
    audio.play().catch(trouble);
  }
  function trouble() {
    if ($(".trouble") || (audio.error === null && audio.readyState > 0)) return;
    $(".controls").after(el("p", "trouble", facts.beside ? `The sound could not be opened: it is looked for in ${facts.beside}, beside this page.` : "This browser cannot play the sound (Ogg Opus)."));
  }
  function tick() {
    const t = audio.currentTime;
    now.textContent = clock(t);
    head.hidden = false; head.style.left = `${100 * Math.min(1, t / width)}%`;
    if (stop !== null && t >= stop) { audio.pause(); stop = null; }
    if (!audio.paused) {
      const i = facts.heard.findIndex(h => h && t >= h[0] && t < h[1]);
      if (i >= 0 && i !== chosen && stop === null) choose(i, false, true);
      reveal(t);
      requestAnimationFrame(tick);
    }
  }
  if (audio) {
    audio.addEventListener("play", () => { play.classList.add("going"); play.setAttribute("aria-label", "Pause"); requestAnimationFrame(tick); });
    audio.addEventListener("pause", () => { play.classList.remove("going"); play.setAttribute("aria-label", "Play"); });
    audio.addEventListener("seeked", tick);
    audio.addEventListener("error", trouble);
    play.addEventListener("click", () => { if (audio.paused) { stop = null; start(); } else audio.pause(); });
    $(".rate").addEventListener("change", e => { audio.playbackRate = +e.target.value; });
  }

  // Hands
  says.forEach((s, i) => {
    s.setAttribute("role", "button"); s.tabIndex = i ? -1 : 0;
    s.addEventListener("click", () => { if (String(getSelection())) return; choose(i, true); hear(i); });
    s.addEventListener("keydown", e => {
      const to = {ArrowDown: next(i, 1), ArrowUp: next(i, -1), Home: next(-1, 1), End: next(rows.length, -1)}[e.key];
      if (to !== undefined) { e.preventDefault(); choose(to, true); }
      else if (e.key === "Escape") { detail.hidden = true; side.classList.remove("chosen"); }
      else if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(i, true); hear(i); }
    });
  });
  field.addEventListener("click", e => {
    const block = e.target.closest(".block");
    if (block) { const i = +block.dataset.i; choose(i, true); hear(i); }
    else if (audio && facts.timed) { stop = null; audio.currentTime = (e.clientX - field.getBoundingClientRect().left) / field.clientWidth * width; }
  });
  const keys = $$(".legend button");
  keys.forEach(k => k.addEventListener("click", () => {
    k.setAttribute("aria-pressed", String(k.getAttribute("aria-pressed") !== "true"));
    const on = keys.filter(x => x.getAttribute("aria-pressed") === "true").map(x => x.dataset.e);
    rows.forEach((r, i) => {
      const dim = on.length > 0 && !on.includes(String(facts.emotions[i])) && !(on.includes("split") && r.classList.contains("split"));
      r.classList.toggle("dim", dim); blocks[i].classList.toggle("dim", dim);
    });
    const open = next(-1, 1);
    says.forEach((s, i) => { s.tabIndex = i === (chosen >= 0 && !rows[chosen].classList.contains("dim") ? chosen : open) ? 0 : -1; });
  }));
  $(".zoom .in").addEventListener("click", () => stretch(zoom * 1.7));
  $(".zoom .out").addEventListener("click", () => stretch(zoom / 1.7));
  $(".zoom .fit").addEventListener("click", () => stretch(1));
  beside.addEventListener("change", place);
  const measure = z => { section.style.setProperty("--deck", `${$(".deck").offsetHeight + 8}px`); stretch(z); };
  let seen = 0;                                       // within a frame the page may be laid out late
  new ResizeObserver(() => {
    const wish = says.length * 30 / scroll.clientWidth, first = !seen;
    if (scroll.clientWidth === seen || !scroll.clientWidth) return;
    seen = scroll.clientWidth;
    measure(first && says.length <= 400 && wish > 1.3 ? wish : zoom);
    if (first) scroll.scrollLeft = 0;
  }).observe(scroll);
}
document.querySelectorAll(".conv").forEach(conversation);
