// Reload the page while it is being rewritten, as soon as nobody selects text in it; keep open what was opened.
"use strict";
const body = document.body;
const reloadS = Number(body.dataset.reloadS);
const written = Number(body.dataset.written);
const details = [...document.querySelectorAll("details[id]")];
const key = `draftline-status:${location.pathname}`;

function remember() {
  try {
    const open = details.filter((one) => one.open).map((one) => one.id);
    sessionStorage.setItem(key, JSON.stringify({ open, y: scrollY }));
  } catch { /* a browser without storage for files */ }
}

function restore() {
  try {
    const { open, y } = JSON.parse(sessionStorage.getItem(key) ?? '{"open": [], "y": 0}');
    for (const one of details) one.open = one.open || open.includes(one.id);
    scrollTo(0, y);
  } catch { /* as above */ }
}

if (reloadS > 0) {
  restore();
  const age = Date.now() / 1000 - written;
  if (age > 3 * reloadS + 30) {
    const note = document.getElementById("stale");
    note.textContent = `This page was written ${Math.round(age / 60)} min ago: its \`distributed status --watch\` has ended.`;
    note.hidden = false;
  }
  setInterval(() => {
    if (!document.hidden && String(getSelection()) === "") {
      remember();
      location.reload();
    }
  }, 1000 * Math.max(0.2, reloadS));
}
body.dataset.ready = "";
