"use strict";
// The page of target/browse.py. Text from the data is only ever set as textContent.

const PAGE_ROWS = 50;
const MIN_SECTION = 250, MAX_SECTION = 4000;
const PIECES_AT_ONCE = 8000;
const MAX_VALUES = 400;
const PLAIN_ORDER = "order of the data";
const blocks = [...document.querySelectorAll("script.block")];
const $ = (id) => document.getElementById(id);

let index, lower, lengths, special;
let order = [];          // rows that match, in the order of the list
let chosen = -1;         // row that is shown
let shown = null;        // its parts, laid out
let page = 0;
let byDraft = false;
let searched = 0;        // number of the last search: an older one stops
let drawn = 0;           // the same for drawing tokens
const unpacked = new Map();
const facets = new Map();

async function unpack(number) {
  if (!unpacked.has(number)) {
    const binary = atob(blocks[number].textContent);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(number, JSON.parse(await new Response(stream).text()));
    blocks[number].textContent = "";
  }
  return unpacked.get(number);
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const count = (number, noun) => `${number.toLocaleString("en")} ${number === 1 ? noun.replace(/s$/, "") : noun}`;
const acceptance = (row) => (index.rows.steps[row] ? 1 + index.rows.accepted[row] / index.rows.steps[row] : 0);
const quoted = (text) => JSON.stringify(text);

// ---------------------------------------------------------------- rows: filters, search, the list

const SORTS = {
  [PLAIN_ORDER]: null,
  "tokens, most": (a, b) => index.rows.tokens[b] - index.rows.tokens[a],
  "tokens, fewest": (a, b) => index.rows.tokens[a] - index.rows.tokens[b],
  "acceptance, lowest": (a, b) => acceptance(a) - acceptance(b),
  "acceptance, highest": (a, b) => acceptance(b) - acceptance(a),
};

function buildFilters() {
  for (const facet of index.facets) {
    if (facet.values.length < 2 && !facet.codes.includes(-1)) continue;
    const counts = new Array(facet.values.length).fill(0);
    for (const code of facet.codes) if (code >= 0) counts[code]++;
    const select = make("select", {}, make("option", { value: "" }, "all"));
    facet.values.slice(0, MAX_VALUES).forEach((value, code) => {
      select.append(make("option", { value: String(code) }, `${value || "(none)"} (${counts[code]})`));
    });
    select.dataset.name = facet.name;
    facets.set(facet.name, select);
    $("facets").append(make("label", {}, facet.name + " ", select));
  }
  for (const name of Object.keys(SORTS)) {
    if (index.draft || !name.startsWith("acceptance")) $("sort").append(make("option", { value: name }, name));
  }
}

function passes(row) {
  const tokens = index.rows.tokens[row];
  if ($("min").value !== "" && tokens < Number($("min").value)) return false;
  if ($("max").value !== "" && tokens > Number($("max").value)) return false;
  return index.facets.every((facet) => {
    const value = facets.get(facet.name)?.value ?? "";
    return value === "" || facet.codes[row] === Number(value);
  });
}

function holds(row, query, parts) {
  const names = `${index.rows.id[row]}\n${index.rows.label[row]}`.toLowerCase();
  return names.includes(query) || parts.some(([, pieces]) => pieces.map((p) => lower[p]).join("").includes(query));
}

async function search() {
  const own = ++searched;
  const query = $("query").value.toLowerCase();
  const total = index.rows.id.length;
  const found = [];
  for (let block = 0, first = 0; block < index.blocks.length; first += index.blocks[block++]) {
    const rows = Array.from({ length: index.blocks[block] }, (_, i) => first + i).filter(passes);
    if (query && rows.length) {
      const content = await unpack(block + 1);
      if (own !== searched) return;
      for (const row of rows) if (holds(row, query, content[row - first][1])) found.push(row);
      if (block % 8 === 7) {
        $("count").textContent = `Searching … ${Math.round((100 * first) / total)}%, ${found.length} so far`;
        await new Promise((resume) => setTimeout(resume));
        if (own !== searched) return;
      }
    } else found.push(...rows);
  }
  const compare = SORTS[$("sort").value];
  order = compare ? found.sort((a, b) => compare(a, b) || a - b) : found;
  showCount(total);
  page = Math.max(0, Math.floor(order.indexOf(chosen) / PAGE_ROWS));
  showList();
  saveState();
  if (order.length && chosen >= 0 && !order.includes(chosen)) await choose(order[0], false);
  else if (shown) await highlight();
  document.body.dataset.searched = String(own); // tests wait for it
}

function showCount(total) {
  const rows = order.length === total ? count(total, index.noun) : `${order.length.toLocaleString("en")} of ${count(total, index.noun)}`;
  const sum = (name) => order.reduce((all, row) => all + index.rows[name][row], 0);
  const steps = sum("steps");
  const draft = steps ? `, acceptance length ${(1 + sum("accepted") / steps).toFixed(3)}` : "";
  $("count").textContent = `${rows}, ${count(sum("tokens"), "tokens")}${draft}`;
}

function tags(row) {
  const found = [];
  for (const facet of index.facets) {
    const value = facet.codes[row] < 0 ? "" : facet.values[facet.codes[row]];
    const warn = (facet.name === "finish reason" && value !== "stop") || (facet.name === "loop" && value === "yes") ||
      (facet.name === "status" && !["done", "truncated"].includes(value));
    const plain = facet.values.length > 1 && ["thinking mode", "category"].includes(facet.name);
    if (value && (warn || plain)) found.push(make("span", { className: warn ? "tag warn" : "tag" }, facet.name === "loop" ? "loop" : value));
  }
  return found;
}

function showList() {
  const rows = order.slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS);
  const items = rows.map((row, i) => {
    const walked = index.rows.steps[row] ? `${acceptance(row).toFixed(2)} · ` : "";
    const number = make("span", { className: "number" }, walked + count(index.rows.tokens[row], "tokens"));
    if (walked) number.title = "acceptance length, tokens";
    const text = index.rows.excerpt[row].map((piece) => index.texts[piece]).join("");
    const item = make(
      "li", { id: `row-${row}`, role: "option" },
      make("div", { className: "line" }, make("span", { className: "label" }, index.rows.label[row]), number),
      make("div", { className: "line" }, ...tags(row), make("span", { className: "excerpt" }, text || "–")),
    );
    item.ariaSelected = String(row === chosen);
    item.ariaPosInSet = String(page * PAGE_ROWS + i + 1);
    item.ariaSetSize = String(order.length);
    item.onclick = () => choose(row);
    return item;
  });
  if (!items.length) items.push(make("li", { role: "option", ariaDisabled: "true" }, "No row matches. Change the search or the filters."));
  $("list").replaceChildren(...items);
  markChosen();
  const pages = Math.max(1, Math.ceil(order.length / PAGE_ROWS));
  $("page").textContent = `page ${page + 1} of ${pages}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page + 1 >= pages;
}

function turn(by) {
  const pages = Math.ceil(order.length / PAGE_ROWS);
  const to = Math.min(pages - 1, Math.max(0, page + by));
  if (to < 0 || to === page) return;
  page = to;
  showList();
  $("list").scrollTop = 0;
}

function markChosen() {
  for (const item of $("list").children) item.ariaSelected = String(item.id === `row-${chosen}`);
  const item = $(`row-${chosen}`);
  if (item) {
    $("list").setAttribute("aria-activedescendant", item.id);
    item.scrollIntoView({ block: "nearest" });
  } else $("list").removeAttribute("aria-activedescendant");
}

// Move by rows; from the top of a page that does not have the chosen row.
function move(by) {
  if (!order.length) return;
  const at = order.indexOf(chosen);
  const here = at >= 0 && Math.floor(at / PAGE_ROWS) === page;
  const to = here || Math.abs(by) > 1 ? Math.min(order.length - 1, Math.max(0, at + by)) : page * PAGE_ROWS;
  if (Math.floor(to / PAGE_ROWS) !== page) {
    page = Math.floor(to / PAGE_ROWS);
    showList();
  }
  choose(order[to], document.body.classList.contains("reading"));
}

// ---------------------------------------------------------------- one row

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

// ---------------------------------------------------------------- keys, state in the address

function saveState() {
  const state = new URLSearchParams();
  if (chosen >= 0) state.set("id", index.rows.id[chosen]);
  for (const id of ["query", "min", "max", "sort"]) if ($(id).value && $(id).value !== PLAIN_ORDER) state.set(id, $(id).value);
  for (const [name, select] of facets) {
    if (select.value) state.set(`is ${name}`, index.facets.find((f) => f.name === name).values[Number(select.value)]);
  }
  if (index.draft && !byDraft) state.set("colour", "mask");
  history.replaceState(null, "", `#${state}`);
}

function readState() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const id of ["query", "min", "max", "sort"]) if (state.has(id)) $(id).value = state.get(id);
  $("sort").value ||= PLAIN_ORDER;
  for (const facet of index.facets) {
    const code = facet.values.indexOf(state.get(`is ${facet.name}`) ?? null);
    if (code >= 0 && facets.has(facet.name)) facets.get(facet.name).value = String(code);
  }
  byDraft = Boolean(index.draft) && state.get("colour") !== "mask";
  return index.rows.id.indexOf(state.get("id"));
}

const KEYS = {
  "j": () => move(1),
  "k": () => move(-1),
  "]": () => turn(1),
  "[": () => turn(-1),
  "/": () => { document.body.classList.remove("reading"); $("query").focus(); $("query").select(); },
  "n": () => step(1),
  "p": () => step(-1),
  "t": () => $("row").querySelector(".tokens")?.focus(),
  "c": () => index.draft && setColours(!byDraft),
  "?": () => $("keys").showModal(),
  "Escape": leave,
};
const LIST_KEYS = {
  "ArrowDown": () => move(1),
  "ArrowUp": () => move(-1),
  "PageDown": () => turn(1),
  "PageUp": () => turn(-1),
  "Home": () => order.length && move(-order.length),
  "End": () => order.length && move(order.length),
  "Enter": () => chosen >= 0 && choose(chosen),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const { target, key } = event;
  if (target.matches("input, select")) {
    if (key === "Escape") { target.blur(); $("list").focus(); }
    return;
  }
  const part = target.layout;
  let act = null;
  if (part && ["ArrowRight", "ArrowLeft"].includes(key)) act = () => moveCursor(part, key === "ArrowRight" ? 1 : -1, event.shiftKey);
  else if (target === $("list") && key in LIST_KEYS) act = LIST_KEYS[key];
  else if (key in KEYS) act = KEYS[key];
  if (act) {
    event.preventDefault();
    act();
  }
}

function listen() {
  let timer;
  const soon = () => { clearTimeout(timer); timer = setTimeout(search, 150); };
  $("filters").addEventListener("input", (event) => (event.target.tagName === "SELECT" ? search() : soon()));
  $("filters").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  $("filters").addEventListener("reset", () => setTimeout(search));
  $("previous").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  $("help").onclick = () => $("keys").showModal();
  document.addEventListener("keydown", onKey);
  $("row").addEventListener("pointerover", (event) => { const at = tokenAt(event); if (at) showCard(...at); });
  $("row").addEventListener("click", (event) => { const at = tokenAt(event); if (at) showCard(...at); });
  $("row").addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hideCard(); });
  $("row").addEventListener("scroll", () => { if (cursor) placeCard(cursor[0].spans[cursor[1]]); });
}

async function begin() {
  index = await unpack(0);
  if (index.draft) $("draft").textContent = `Draft: ${index.draft}`;
  lower = index.texts.map((text) => text.toLowerCase());
  lengths = index.ids.map((ids) => (Array.isArray(ids) ? ids.length : 1));
  special = new Set(index.special);
  buildFilters();
  listen();
  const row = readState();
  await search();
  if (row >= 0) await choose(row);
  else if (order.length) await choose(order[0], false);
  document.body.dataset.ready = String(Math.round(performance.now()));
}

begin();
