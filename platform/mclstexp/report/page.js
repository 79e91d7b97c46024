"use strict";

// Sorts a table by the clicked column; numbers by data-value or text, missing ones last.
function makeSortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  const sort = (heading) => {
    const column = headings.indexOf(heading);
    const isNumeric = heading.classList.contains("n");
    const wasDescending = heading.getAttribute("aria-sort") === "descending";
    const wasAscending = heading.getAttribute("aria-sort") === "ascending";
    const sign = (isNumeric ? wasDescending : !wasAscending) ? 1 : -1;
    const rows = [...table.tBodies[0].rows].map((row) => {
      const cell = row.cells[column];
      return { row, key: isNumeric ? parseFloat(cell.dataset.value ?? cell.textContent) : cell.textContent };
    });
    rows.sort((a, b) => {
      if (!isNumeric) return sign * a.key.localeCompare(b.key, "en", { numeric: true });
      return isNaN(a.key) - isNaN(b.key) || sign * (a.key - b.key) || 0;
    });
    headings.forEach((each) => each.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    table.tBodies[0].append(...rows.map((each) => each.row));
  };
  for (const heading of headings) {
    heading.tabIndex = 0;
    heading.addEventListener("click", () => sort(heading));
    heading.addEventListener("keydown", (event) => event.key === "Enter" && sort(heading));
  }
}

// Shows the rows of a table whose first two cells contain the text.
function makeFilter(input, table, count) {
  const rows = [...table.tBodies[0].rows];
  const filter = () => {
    const text = input.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const isShown = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase().includes(text);
      row.hidden = !isShown;
      shown += isShown;
    }
    count.textContent = `${shown} of ${rows.length} genes`;
  };
  input.addEventListener("input", filter);
  filter();
}

const readJson = (id) => JSON.parse(document.getElementById(id).textContent);
const decode = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

// Draws the chosen gene of the chosen section, measured beside predicted.
class Viewer {
  constructor() {
    for (const id of ["section", "gene", "gene-search", "opacity", "measured", "predicted", "bar"]) {
      this[id] = document.getElementById(id);
    }
    this.choice = readJson("choice");
    const rgb = decode(this.choice.colours);
    this.colours = Array.from({ length: 256 }, (_, level) => `rgb(${rgb.subarray(3 * level, 3 * level + 3).join()})`);
    this.slides = new Map();
    this.fillGenes("");
    this.drawBar();
    this.section.addEventListener("change", () => this.show());
    this.gene.addEventListener("change", () => this.show());
    this.opacity.addEventListener("input", () => this.draw());
    this["gene-search"].addEventListener("input", () => this.search());
    new ResizeObserver(() => this.draw()).observe(this.measured.parentElement);
    this.show();
  }

  fillGenes(text) {
    const has = (gene) => gene.toLowerCase().includes(text.trim().toLowerCase());
    const group = (label, genes) => {
      const element = document.createElement("optgroup");
      element.label = label;
      element.append(...genes.filter(has).map((gene) => new Option(gene, gene)));
      return element;
    };
    const groups = this.choice.sets.map(([name, genes]) => group(name, genes));
    this.gene.replaceChildren(...[...groups, group("all genes", this.choice.genes)].filter((each) => each.children.length));
    this.gene.selectedIndex = 0;
  }

  search() {
    this.fillGenes(this["gene-search"].value);
    if (this.gene.options.length) this.show();
  }

  choose(gene) {
    if (!this.choice.genes.includes(gene)) return;
    this["gene-search"].value = "";
    this.fillGenes("");
    this.gene.value = gene;
    this.show();
  }

  slide() {
    const index = this.section.value;
    if (!this.slides.has(index)) {
      const slide = readJson(`section-${index}`);
      slide.picture = new Image();
      slide.picture.addEventListener("load", () => this.draw());
      slide.picture.src = slide.image;
      this.slides.set(index, slide);
    }
    return this.slides.get(index);
  }

  show() {
    const slide = this.slide();
    const map = slide.genes[this.gene.value];
    const pcc = !map ? "not in the panel of this section's model"
      : !this.numMeasured(slide, decode(map.levels)) ? "this section does not measure it"
      : map.pcc === null ? "PCC undefined: measured or predicted values are constant" : `PCC ${map.pcc.toFixed(3)}`;
    document.getElementById("map-title").textContent = `${this.gene.value} in section ${slide.id}: ${pcc}`;
    document.getElementById("low").textContent = map ? `‹ ${map.low.toFixed(2)}` : "";
    document.getElementById("high").textContent = map ? `${map.high.toFixed(2)} ›` : "";
    document.getElementById("unit").textContent = slide.unit;
    this.draw();
  }

  // Measured values come before one predicted value for each spot.
  numMeasured(slide, levels) {
    return Math.max(0, levels.length - slide.x.length);
  }

  draw() {
    const slide = this.slide();
    const map = slide.genes[this.gene.value];
    const levels = map ? decode(map.levels) : new Uint8Array();
    const half = this.numMeasured(slide, levels);
    this.drawMap(this.measured, slide, levels.subarray(0, half));
    this.drawMap(this.predicted, slide, levels.subarray(half));
  }

  drawMap(canvas, slide, levels) {
    const [left, top, right, bottom] = slide.window;
    const width = Math.round(canvas.parentElement.clientWidth * (window.devicePixelRatio || 1));
    const scale = width / (right - left);
    canvas.width = width;
    canvas.height = Math.round(scale * (bottom - top));
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, -scale * left, -scale * top);
    if (slide.picture.complete) context.drawImage(slide.picture, 0, 0, slide.width, slide.height);
    context.globalAlpha = this.opacity.value / 100;
    levels.forEach((level, spot) => {
      context.fillStyle = this.colours[level];
      context.beginPath();
      context.arc(slide.x[spot], slide.y[spot], slide.diameter / 2, 0, 2 * Math.PI);
      context.fill();
    });
  }

  drawBar() {
    const context = this.bar.getContext("2d");
    this.colours.forEach((colour, level) => {
      context.fillStyle = colour;
      context.fillRect(level, 0, 1, 1);
    });
  }
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
const geneTable = document.getElementById("gene-table");
makeFilter(document.getElementById("gene-filter"), geneTable, document.getElementById("gene-count"));
if (document.getElementById("gene")) {
  const viewer = new Viewer();
  geneTable.addEventListener("click", (event) => event.target.dataset.gene && viewer.choose(event.target.dataset.gene));
}
