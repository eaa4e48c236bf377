"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll(".plot")];

// Plotly draws with attributes, so the page's colours are handed to it, and again whenever they change.
function colours() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--muted").trim();
  const line = style.getPropertyValue("--line").trim();
  return {
    "font.color": text,
    "modebar.color": text,
    "modebar.activecolor": style.getPropertyValue("--accent").trim(),
    "xaxis.gridcolor": line,
    "xaxis.linecolor": line,
    "yaxis.gridcolor": line,
    "yaxis.linecolor": line,
  };
}

function draw(plot) {
  const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
  const options = {
    responsive: true,
    displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  return Plotly.newPlot(plot, data, layout, options).then(() => Plotly.relayout(plot, colours()));
}

function recolour() {
  for (const plot of plots) Plotly.relayout(plot, colours());
}

function refit() {
  recolour();
  for (const plot of plots) Plotly.Plots.resize(plot);
}

function makeExplorer(explorer) {
  const input = explorer.querySelector("input");
  const output = explorer.querySelector("output");
  const body = explorer.querySelector("tbody");
  const headers = [...explorer.querySelectorAll("th")];
  const rows = [...body.rows].map((row) => {
    const [example, status] = [row.cells[0], row.cells[row.cells.length - 1]];
    return { row, text: `${example.textContent} ${status.textContent}`.toLowerCase() };
  });

  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, text } of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    output.textContent = words.length ? `${shown} of ${rows.length} shown` : `${rows.length} shown`;
  });

  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      body.append(...sorted(rows, column, descending).map(({ row }) => row));
    });
  });
}

function sorted(rows, column, descending) {
  const direction = descending ? -1 : 1;
  const keyed = rows.map((entry) => {
    const cell = entry.row.cells[column];
    const number = cell.dataset.value;
    return { ...entry, missing: number === "", key: number === undefined ? cell.textContent : Number(number) };
  });
  return keyed.sort((a, b) => {
    if (a.missing || b.missing) return a.missing - b.missing;
    return direction * (typeof a.key === "number" ? a.key - b.key : a.key.localeCompare(b.key));
  });
}

function followSections() {
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver(
    (entries) => {
      const entered = entries.find((entry) => entry.isIntersecting);
      if (!entered) return;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entered.target.id).setAttribute("aria-current", "true");
    },
    { rootMargin: "-10% 0px -80% 0px" },
  );
  for (const section of document.querySelectorAll("main > section")) observer.observe(section);
}

plots.forEach(draw);
document.querySelectorAll(".explorer").forEach(makeExplorer);
followSections();
dark.addEventListener("change", recolour);
addEventListener("beforeprint", refit);
addEventListener("afterprint", refit);
