"use strict";
// The page reads without this: it makes the columns of tables sortable, and shows one layer of many at a time.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("th")], body = table.tBodies[0];
  if (!body || body.rows.length < 4) continue;
  const order = [...body.rows];
  const number = text => { const found = text.replace(/,/g, "").match(/-?[\d.]+(e-?\d+)?/i); return found ? +found[0] : -Infinity; };
  const scale = text => number(text) * ({k: 1e3, M: 1e6, G: 1e9, B: 1e9, T: 1e12}[(text.match(/[\d.](B| ?[kMGT])/) || [""])[0].slice(-1)] || 1);  // "6.9B" is a number, "320 B" are bytes
  heads.forEach((head, column) => {
    head.dataset.sort = "";
    head.addEventListener("click", () => {
      const state = head.getAttribute("aria-sort"), next = state === "descending" ? "ascending" : state === "ascending" ? null : "descending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      const text = row => row.cells[column].textContent.trim();
      const numeric = order.every(row => /^[-–+]|^\d/.test(text(row)) || !text(row));
      const rows = [...order];
      if (next) {
        head.setAttribute("aria-sort", next);
        rows.sort((a, b) => numeric ? scale(text(a)) - scale(text(b)) : text(a).localeCompare(text(b)));
        if (next === "descending") rows.reverse();
      }
      body.append(...rows);
    });
  });
}
for (const details of document.querySelectorAll("details.layers")) {
  const figures = [...details.querySelectorAll("figure")], picker = document.createElement("select");
  picker.className = "picker";
  picker.setAttribute("aria-label", "layer");
  for (const word of ["all layers", ...figures.map(figure => figure.querySelector("figcaption").textContent)]) picker.add(new Option(word));
  const show = () => figures.forEach((figure, at) => { figure.hidden = picker.selectedIndex > 0 && picker.selectedIndex !== at + 1; });
  picker.addEventListener("change", show);
  picker.selectedIndex = 1;
  show();
  details.open = true;
  details.querySelector("summary").after(picker);
}
