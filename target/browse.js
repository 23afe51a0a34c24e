"use strict";
// The page of target/browse.py: its data, the list of rows, keys. browse_row.js, the same script, shows one row.
// Text from the data is only ever set as text, never as HTML.

const PAGE_ROWS = 50;
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
