"use strict";
// Theme: follows the system until the reader chooses; a file:// page may have no storage.
(() => {
  const root = document.documentElement;
  const button = document.querySelector("[data-theme-toggle]");
  const stored = () => { try { return localStorage.getItem("autotune-theme"); } catch { return null; } };
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  if (stored() === "dark" || stored() === "light") root.dataset.theme = stored();
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("autotune-theme", root.dataset.theme); } catch { /* not kept */ }
  });
})();

// Tooltips of marks: beside the pointer, inside the window.
(() => {
  const tip = document.getElementById("tip");
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 18;
    const y = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
    tip.style.left = `${Math.max(x, 8)}px`;
    tip.style.top = `${Math.max(y, 8)}px`;
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
})();

// Sorting: a click, Enter or Space on a column's button; again reverses. Empty cells stay last.
(() => {
  const table = document.querySelector("table.sortable");
  if (!table) return;
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const status = document.querySelector(`[data-status="${table.id}"]`);
  const filter = document.querySelector(`[data-filter="${table.id}"]`);
  const sort = (column) => {
    const descending = heads[column].getAttribute("aria-sort") === "ascending";
    const rows = [...body.rows];
    const keys = new Map(rows.map((row) => [row, row.cells[column].dataset.key]));
    const numeric = [...keys.values()].every((key) => key === "" || Number.isFinite(Number(key)));
    rows.sort((one, other) => {
      const a = keys.get(one), b = keys.get(other);
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = numeric ? Number(a) - Number(b) : a.localeCompare(b);
      return descending ? -order : order;
    });
    body.append(...rows);
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
  };
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-column]");
    if (button) sort(Number(button.dataset.column));
  });
  filter.addEventListener("change", (event) => {
    const wanted = event.target.value;
    let count = 0;
    for (const row of body.rows) {
      const show = wanted === "all" || row.dataset.outcome === wanted || row.dataset.kind === wanted;
      row.hidden = !show;
      count += show;
    }
    status.textContent = `${count} of ${body.rows.length} shown`;
  });
  // A link to a row must find it even when the filter hides it.
  const reveal = () => {
    const row = document.getElementById(location.hash.slice(1));
    if (row && row.hidden) {
      const all = filter.querySelector('input[value="all"]');
      all.checked = true;
      all.dispatchEvent(new Event("change", { bubbles: true }));
      row.scrollIntoView({ block: "center" });
    }
  };
  addEventListener("hashchange", reveal);
})();

// Copying: the clipboard where the browser allows it, else the text is selected.
(() => {
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = false;
    const label = button.textContent;
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      const json = source.tagName === "SCRIPT";
      const text = json ? JSON.stringify(JSON.parse(source.textContent), null, 2) : source.textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        if (!json) getSelection().selectAllChildren(source);
        button.textContent = json ? "Not allowed" : "Selected";
      }
      setTimeout(() => { button.textContent = label; }, 1600);
    });
  }
})();

// Printing shows what is folded away, and folds it again afterwards.
(() => {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => { opened.forEach((details) => { details.open = false; }); });
})();
