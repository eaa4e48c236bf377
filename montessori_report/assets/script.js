"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll(".plot")];
const drawn = new Set();
const paper = { "--muted": "#444", "--line": "#ccc", "--accent": "#0067a3" };
const paperWidth = 640; // pixels of a figure on A4 or Letter

// Plotly cannot use CSS variables: pass it the page's colours, again whenever they change.
function colours(layout, palette) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => palette?.[name] ?? style.getPropertyValue(name).trim();
  const values = {
    "font.color": colour("--muted"),
    "modebar.color": colour("--muted"),
    "modebar.activecolor": colour("--accent"),
  };
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    values[`${axis}.gridcolor`] = colour("--line");
    values[`${axis}.linecolor`] = colour("--line");
  }
  return values;
}

function contents(plot) {
  return JSON.parse(plot.parentElement.querySelector("script.figure").textContent);
}

function draw(plot) {
  if (drawn.has(plot)) return;
  drawn.add(plot);
  const { data, layout } = contents(plot).plot;
  const values = colours(layout);
  for (const [path, colour] of Object.entries(values)) {
    const [part, name] = path.split(".");
    layout[part] = { ...layout[part], [name]: colour };
  }
  Plotly.newPlot(plot, data, layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtons: [layout.xaxis ? ["toImage", "zoom2d", "pan2d", "resetScale2d"] : ["toImage"]],
  });
}

// Draw one figure at a time, to keep the page responsive.
function drawNext() {
  const next = plots.find((plot) => !drawn.has(plot));
  if (!next) return;
  draw(next);
  setTimeout(drawNext);
}

function recolour() {
  for (const plot of drawn) Plotly.relayout(plot, colours(plot.layout));
}

// The browser sends beforeprint while the page still has its screen layout.
function layOutForPaper() {
  plots.forEach(draw);
  for (const plot of plots) Plotly.relayout(plot, { ...colours(plot.layout, paper), width: paperWidth });
}

function layOutForScreen() {
  for (const plot of plots) Plotly.relayout(plot, { ...colours(plot.layout), width: null, autosize: true });
}

function offerData(button) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([contents(button).csv], { type: "text/csv" }));
    link.download = button.dataset.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href));
  });
}

// Return an element with text. Text written by models is inserted only here, never as markup.
function element(name, text = "", className = "") {
  const node = document.createElement(name);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

function modelText(text) {
  const block = element("div", text, "model");
  block.dir = "auto";
  return block;
}

function rowOf([instruction, response, summary, cells], columns) {
  const row = document.createElement("tr");
  const texts = document.createElement("td");
  texts.append(modelText(instruction));
  if (response !== null) {
    const folded = element("details", "", "response");
    folded.append(element("summary", summary), modelText(response));
    texts.append(folded);
  }
  row.append(texts);
  cells.forEach(([text, remark], column) => {
    const cell = element("td", text);
    cell.dataset.label = columns[column];
    if (remark) cell.append(" ", element("small", remark));
    row.append(cell);
  });
  return row;
}

function makeExplorer(explorer) {
  const input = explorer.querySelector("input");
  const output = explorer.querySelector("output");
  const table = explorer.querySelector(".scroll");
  const body = explorer.querySelector("tbody");
  const pager = explorer.querySelector(".pager");
  const headers = [...explorer.querySelectorAll("th")];
  const columns = headers.slice(1).map((header) => header.textContent);
  const perPage = Number(explorer.dataset.rows);
  // Parsed on first use: the HTML already contains the first page.
  let entries, matches;
  let page = 0;

  function read() {
    if (entries) return;
    const rows = JSON.parse(explorer.querySelector("script.rows").textContent);
    entries = rows.map((row) => {
      const [instruction, response, , cells] = row;
      return { row, text: `${instruction} ${response ?? ""} ${cells[cells.length - 1][0]}`.toLowerCase() };
    });
    matches = entries;
  }

  function show(number) {
    page = number;
    body.replaceChildren(...matches.slice(page * perPage, (page + 1) * perPage).map(({ row }) => rowOf(row, columns)));
    table.scrollTop = 0;
    showPager(matches.length);
  }

  function showPager(count) {
    const pages = Math.max(1, Math.ceil(count / perPage));
    pager.hidden = pages === 1;
    pager.querySelector("span").textContent = `Page ${page + 1} of ${pages.toLocaleString("en")}`;
    for (const button of pager.querySelectorAll("button")) {
      const target = page + Number(button.value);
      button.disabled = target < 0 || target >= pages;
    }
  }

  function search() {
    read();
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    matches = entries.filter(({ text }) => words.every((word) => text.includes(word)));
    const [shown, all] = [matches.length, entries.length].map((count) => count.toLocaleString("en"));
    output.textContent = words.length ? `${shown} of ${all} examples` : `${all} examples`;
    show(0);
  }

  input.addEventListener("input", search);
  for (const button of pager.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      read();
      show(page + Number(button.value));
    });
  }
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      read();
      entries = sorted(entries, column, descending);
      search();
    });
  });
  explorer.querySelector(".filter").hidden = false;
  showPager(Number(output.textContent.replace(/\D/g, "")));
}

function sorted(entries, column, descending) {
  const direction = descending ? -1 : 1;
  const order = new Intl.Collator();
  const keyed = entries.map((entry) => ({ entry, key: column ? entry.row[3][column - 1][2] : entry.row[0] }));
  keyed.sort(({ key: a }, { key: b }) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * (typeof a === "number" ? a - b : order.compare(a, b));
  });
  return keyed.map(({ entry }) => entry);
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

document.querySelectorAll(".explorer").forEach(makeExplorer);
document.querySelectorAll(".download").forEach(offerData);
followSections();
drawNext();
dark.addEventListener("change", recolour);
addEventListener("beforeprint", layOutForPaper);
addEventListener("afterprint", layOutForScreen);
