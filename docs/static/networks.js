"use strict";
// The search field above the table of networks: every word must be in a row.
document.addEventListener("DOMContentLoaded", () => {
  const field = document.getElementById("networks-search");
  if (!field) return;
  const rows = [...document.querySelectorAll("#networks tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const count = document.getElementById("networks-count");
  const search = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      const matches = words.every((word) => texts[i].includes(word));
      row.hidden = !matches;
      shown += matches;
    });
    count.textContent = `${shown} of ${rows.length}`;
  };
  field.addEventListener("input", search);
  search();
});
