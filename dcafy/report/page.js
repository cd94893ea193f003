"use strict";
// -- what a pointer or a finger is told
const tip = document.getElementById("tip");
function hide() { tip.hidden = true; }
let tapped = null;
function show(target, then = "") {
  tip.textContent = target.dataset.tip + then;
  tip.hidden = false;
  const at = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(at.left + at.width / 2, 4), document.documentElement.clientWidth - own.width - 4);
  const below = at.bottom + 6 + own.height < window.innerHeight;
  tip.style.left = `${Math.max(left, 4) + window.scrollX}px`;
  tip.style.top = `${(below ? at.bottom + 6 : at.top - own.height - 6) + window.scrollY}px`;
}
for (const target of document.querySelectorAll("[data-tip]")) {
  // The tip takes the place of the browser's own, which a finger cannot reach.
  target.querySelector("title")?.remove();
  target.removeAttribute("title");
  if (!target.matches(".term")) target.setAttribute("aria-label", target.dataset.tip);
  for (const kind of ["pointerenter", "focus"]) target.addEventListener(kind, () => show(target));
  target.addEventListener("click", (event) => {
    // A finger cannot point: the first tap tells, and the second one goes where a link leads.
    const first = event.pointerType === "touch" && tapped !== target && target.matches("a:not(.term)");
    tapped = target;
    if (first) event.preventDefault();
    show(target, first ? "\n(tap again to go to its values)" : "");
  });
  for (const kind of ["pointerleave", "blur"]) target.addEventListener(kind, hide);
}
for (const word of document.querySelectorAll("a.term")) word.addEventListener("click", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  hide();
  for (const box of document.querySelectorAll(".zoom input:checked")) box.checked = false;
});

// -- on paper nothing can be opened
window.addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("details")) closed.open = true;
});

// -- a block that was clicked: its row is marked, too
function mark() {
  for (const row of document.querySelectorAll("[data-of]"))
    row.classList.toggle("chosen", location.hash === `#${row.dataset.of}`);
}
window.addEventListener("hashchange", mark);
mark();

// -- tables: a click on a heading sorts, a second one the other way round
function value(row, place) {
  const text = row.cells[place].textContent.trim(), number = parseFloat(text.replace(/,/g, ""));
  return row.cells[place].matches(".number") ? (Number.isNaN(number) ? -Infinity : number) : text;
}
function compare(a, b) { return typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true}); }
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => down * compare(value(a, place), value(b, place))));
    });
  });
}
