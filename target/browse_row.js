"use strict";
// One row of the page of target/browse.py: its tokens, their colours, matches of the search, the card of a token.

const MIN_SECTION = 250, MAX_SECTION = 4000;
const PIECES_AT_ONCE = 8000;
let drawn = 0; // number of the last drawing of tokens: an older one stops

async function choose(row, open = true) {
  chosen = row;
  markChosen();
  let block = 0, first = 0;
  while (row >= first + index.blocks[block]) first += index.blocks[block++];
  const [facts, parts] = (await unpack(block + 1))[row - first];
  if (chosen !== row) return;
  document.body.classList.toggle("reading", open);
  hideCard();
  saveState();
  const back = make("button", { id: "back", type: "button", onclick: leave }, "‹ List");
  const title = make("div", { className: "tools" }, back, make("span", { className: "title" }, index.rows.id[row]));
  const tools = make("div", { className: "tools", id: "tools" });
  $("row").replaceChildren(title, listFacts(row, facts), tools);
  $("row").scrollTop = 0;
  shown = parts.map(layOut);
  for (const part of shown) {
    const length = `${count(part.numTokens, "tokens")}, ${part.numSupervised.toLocaleString("en")} in the loss`;
    const label = part.name ? `${part.name}: ${length}` : length;
    $("row").append(make("h2", {}, label), part.element);
  }
  showTools();
  await draw();
  await highlight();
  document.body.dataset.row = String(row); // tests wait for it
}

function listFacts(row, facts) {
  const list = make("dl", { className: "facts" });
  const values = index.facets.filter((f) => f.codes[row] >= 0).map((f) => [f.name, f.values[f.codes[row]] || "(none)"]);
  for (const [name, value] of [...values, ...Object.entries(facts)]) {
    const wide = String(value).length > 40;
    list.append(make("div", { className: wide ? "wide" : "" }, make("dt", {}, name), make("dd", {}, String(value))));
  }
  return list;
}

// Give every piece its token position, whether it is in the loss, and its role in the draft's walk.
function layOut([name, pieces, spans, steps]) {
  const starts = new Array(pieces.length);
  let numTokens = 0;
  pieces.forEach((piece, i) => { starts[i] = numTokens; numTokens += lengths[piece]; });
  const supervised = new Uint8Array(pieces.length);
  for (let i = 0; i < spans.length; i += 2) supervised.fill(1, spans[i], spans[i + 1]);
  let numSupervised = 0;
  pieces.forEach((piece, i) => { if (supervised[i]) numSupervised += lengths[piece]; });
  const part = { name, pieces, starts, supervised, steps, numTokens, numSupervised, role: [], stepOf: [], counts: {}, spans: [] };
  if (steps) assignRoles(part, spans);
  part.element = make("div", { className: "tokens", tabIndex: 0, role: "group" });
  part.element.ariaLabel = "tokens; arrow keys show one after another";
  part.element.layout = part;
  return part;
}

function assignRoles(part, spans) {
  const roles = new Array(part.numTokens).fill("");
  const stepOf = new Array(part.numTokens).fill(-1);
  const K = part.steps.length ? part.steps[0].length - 2 : 0;
  const edges = spans.map((piece) => part.starts[piece] ?? part.numTokens);
  for (let i = 0; i < edges.length; i += 2) roles[edges[i]] = "first";
  part.ends = new Array(part.steps.length);
  let span = 0;
  part.steps.forEach(([place, accepted], number) => {
    while (edges[span + 1] <= place) span += 2;
    const end = (part.ends[number] = edges[span + 1] ?? part.numTokens);
    for (let i = 1; i <= accepted + 1 && place + i < end; i++) {
      stepOf[place + i] = number;
      roles[place + i] = i <= accepted ? "accepted" : accepted === K ? "bonus" : "wrong";
    }
  });
  part.pieces.forEach((piece, i) => {
    // A piece of several tokens shows what is worst among them.
    const own = roles.slice(part.starts[i], part.starts[i] + lengths[piece]);
    part.role[i] = own.includes("wrong") ? "wrong" : own[0];
    part.stepOf[i] = stepOf[part.starts[i] + Math.max(0, own.indexOf("wrong"))];
  });
  for (const role of roles) part.counts[role] = (part.counts[role] ?? 0) + 1;
}

function classOf(part, i) {
  const classes = special.has(part.pieces[i]) ? ["special"] : [];
  const odd = (on) => (on ? " odd" : "");
  if (byDraft && part.steps) {
    if (part.role[i]) classes.push(part.role[i] + odd(part.stepOf[i] % 2));
  } else if (part.supervised[i]) classes.push("marked" + odd(i % 2));
  if (part.hits?.has(i)) classes.push("hit");
  return classes.join(" ");
}

// Signs for characters that would be invisible; they are no part of the text that is copied.
function fill(span, text) {
  const pattern = /[\n\t]|[\p{Cc}\p{Cf}]/gu;
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    span.append(text.slice(end, match.index));
    end = match.index + match[0].length;
    const code = match[0].codePointAt(0);
    const sign = match[0] === "\n" ? "↵" : match[0] === "\t" ? "⇥" : `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
    span.append(make("span", { className: "sign", ariaHidden: "true" }, sign));
    if (match[0] === "\n" || match[0] === "\t") span.append(match[0]);
  }
  span.append(text.slice(end) || (end ? "" : "‹empty›"));
}

// Sections end at line breaks, and the browser lays out only those in view: a row may have 100,000 tokens.
async function draw() {
  const own = ++drawn;
  for (const part of shown) {
    part.spans = [];
    part.element.replaceChildren();
    while (part.spans.length < part.pieces.length) {
      const section = make("div", { className: "section" });
      for (let i = part.spans.length, n = 0; i < part.pieces.length && n < MAX_SECTION; i++, n++) {
        const text = index.texts[part.pieces[i]];
        const span = make("span", { className: classOf(part, i), place: i });
        fill(span, text);
        part.spans.push(span);
        section.append(span);
        if (n >= MIN_SECTION && text.endsWith("\n")) break;
      }
      part.element.append(section);
      if (part.spans.length % PIECES_AT_ONCE < section.childElementCount) await new Promise((resume) => setTimeout(resume));
      if (own !== drawn) return;
    }
  }
}

function recolour() {
  for (const part of shown) part.spans.forEach((span, i) => { span.className = classOf(part, i); });
}

function showTools() {
  const tools = $("tools");
  tools.replaceChildren();
  if (!shown.length) return;
  const key = (colour, text) => {
    const box = make("i");
    box.style.setProperty("--colour", `var(--${colour})`);
    return make("span", { className: "key" }, box, text);
  };
  const walked = shown.filter((part) => part.steps);
  if (walked.length) {
    const button = (text, on) => make("button", {
      type: "button", ariaPressed: String(byDraft === on), onclick: () => setColours(on),
    }, text);
    tools.append(make("span", { className: "group", role: "group", ariaLabel: "colour by (c)" }, button("Draft", true), button("Loss mask", false)));
  }
  if (byDraft && walked.length) {
    const sum = (role) => walked.reduce((all, part) => all + (part.counts[role] ?? 0), 0);
    tools.append(
      key("accepted", `${sum("accepted")} accepted`), key("wrong", `${sum("wrong")} where the draft was wrong`),
      key("bonus", `${sum("bonus")} after a step accepted whole`), key("first", `${sum("first")} first`),
      make("b", {}, `${count(index.rows.steps[chosen], "steps")}, acceptance length ${acceptance(chosen).toFixed(2)}`),
    );
  } else tools.append(key("marked", "in the loss"));
  tools.append(make("span", { id: "matches", role: "status" }));
}

function setColours(on) {
  byDraft = on;
  if (!shown) return;
  showTools();
  recolour();
  highlight();
  saveState();
}

function leave() {
  document.body.classList.remove("reading");
  hideCard();
  markChosen();
  $("list").focus();
}

// ---------------------------------------------------------------- matches of the search

async function highlight() {
  const query = $("query").value.toLowerCase();
  const matches = [];
  for (const part of shown) {
    part.hits = new Set();
    if (!query) continue;
    const ends = [];
    let text = "";
    for (const piece of part.pieces) { text += lower[piece]; ends.push(text.length); }
    for (let at = text.indexOf(query), i = 0; at >= 0; at = text.indexOf(query, at + query.length)) {
      while (ends[i] <= at) i++;
      matches.push([part, i]);
      for (let j = i; j < ends.length && (j === i || ends[j - 1] < at + query.length); j++) part.hits.add(j);
    }
  }
  recolour();
  shown.matches = matches;
  shown.at = -1;
  if (query) step(1);
}

function step(by) {
  const matches = shown?.matches ?? [];
  if (matches.length) {
    shown.at = (shown.at + by + matches.length) % matches.length;
    const [part, i] = matches[shown.at];
    part.spans[i]?.scrollIntoView({ block: "center" });
  }
  if ($("matches")) $("matches").textContent = $("query").value ? `match ${shown.at + 1} of ${matches.length} (n, p)` : "";
}

// ---------------------------------------------------------------- the card of a token

let cursor = null; // [part, place of the piece]

function hideCard() {
  $("card").hidden = true;
  if (cursor) mark(cursor[0], cursor[1], false);
  cursor = null;
}

function mark(part, i, on) {
  part.spans[i]?.classList.toggle("cursor", on);
  if (!byDraft || !part.steps || part.stepOf[i] < 0) return;
  for (let j = i; j >= 0 && part.stepOf[j] === part.stepOf[i]; j--) part.spans[j]?.classList.toggle("step", on && j !== i);
  for (let j = i + 1; j < part.spans.length && part.stepOf[j] === part.stepOf[i]; j++) part.spans[j].classList.toggle("step", on);
}

function showCard(part, i) {
  if (cursor) mark(cursor[0], cursor[1], false);
  cursor = [part, i];
  mark(part, i, true);
  const piece = part.pieces[i];
  const ids = [index.ids[piece]].flat();
  const kind = special.has(piece) ? "special, " : "";
  const loss = part.supervised[i] ? "in the loss" : "not in the loss";
  const where = make("p", { className: "quiet" }, `token ${part.starts[i]}, id ${ids.join(" ")}, ${kind}${loss}`);
  $("card").replaceChildren(make("p", {}, make("code", {}, quoted(index.texts[piece]))), where);
  if (part.steps && part.supervised[i]) $("card").append(...describeStep(part, i));
  $("card").hidden = false;
  placeCard(part.spans[i]);
}

function describeStep(part, i) {
  const number = part.stepOf[i];
  if (number < 0) return [make("p", {}, part.role[i] === "first" ? "First token of the reply: it comes with the prompt." : "Not walked.")];
  const [place, accepted, ...drafted] = part.steps[number];
  const slot = part.starts[i] - place;
  const said = {
    accepted: `draft token ${slot} of ${drafted.length}, accepted`,
    wrong: `draft token ${slot} was wrong; this is the target's`,
    bonus: `the target's token after all ${drafted.length} draft tokens`,
  }[part.role[i]];
  const chips = drafted.map((piece, k) => {
    const after = place + 1 + k >= part.ends[number];
    const kind = k < accepted ? "accepted" : k === accepted && !after ? "wrong" : "unused";
    const chip = make("li", { className: `chip ${kind}` }, quoted(index.texts[piece]).slice(1, -1));
    chip.append(make("span", { className: "hidden" }, ` (${kind})`));
    return chip;
  });
  return [
    make("p", {}, `Step ${number + 1} of ${part.steps.length}: ${said}.`),
    make("p", { className: "quiet" }, `Drafted after token ${place}; ${accepted} accepted:`),
    make("ol", {}, ...chips),
  ];
}

function placeCard(span) {
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const card = $("card").getBoundingClientRect();
  const below = box.bottom + 8 + card.height < innerHeight;
  $("card").style.left = `${Math.max(8, Math.min(box.left, innerWidth - card.width - 8))}px`;
  $("card").style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - card.height - 8)}px`;
}

function tokenAt(event) {
  const span = event.target.closest?.(".section > span");
  return span ? [span.closest(".tokens").layout, span.place] : null;
}

function moveCursor(part, by, wholeSteps) {
  let i = cursor && cursor[0] === part ? cursor[1] : by > 0 ? -1 : part.pieces.length;
  const from = part.stepOf[i];
  do i += by;
  while (wholeSteps && part.steps && i > 0 && i < part.pieces.length - 1 && (part.stepOf[i] === from || part.stepOf[i] < 0));
  i = Math.min(part.spans.length - 1, Math.max(0, i));
  part.spans[i].scrollIntoView({ block: "nearest" });
  showCard(part, i);
}
