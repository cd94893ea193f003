"use strict";
const tip = document.getElementById("tip");
function hide() { tip.hidden = true; }
function show(target) {
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const at = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(at.left + at.width / 2, 4), document.documentElement.clientWidth - own.width - 4);
  const below = at.bottom + 6 + own.height < window.innerHeight;
  tip.style.left = `${Math.max(left, 4) + window.scrollX}px`;
  tip.style.top = `${(below ? at.bottom + 6 : at.top - own.height - 6) + window.scrollY}px`;
}
for (const target of document.querySelectorAll("[data-tip]")) {
  // The tip takes the place of the browser's own, which a finger cannot reach.
  target.querySelector("title").remove();
  target.setAttribute("aria-label", target.dataset.tip);
  for (const kind of ["pointerenter", "focus", "click"]) target.addEventListener(kind, () => show(target));
  for (const kind of ["pointerleave", "blur"]) target.addEventListener(kind, hide);
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
