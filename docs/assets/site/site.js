// What the pages of the site do beyond the theme: formulas, the explorer's frame, and the zoo as cards or as a sortable table.
"use strict";
(() => {
  const here = document.currentScript.src, file = path => new URL(path, here).href;
  const load = path => new Promise((done, failed) => {
    const script = document.createElement("script");
    Object.assign(script, { src: file(path), onload: done, onerror: () => failed(new Error(`${path} could not be loaded`)) });
    document.head.append(script);
  });

  // KaTeX is 270 kB, so only the pages that have formulas load it.
  async function typeset() {
    const formulas = document.querySelectorAll(".arithmatex");
    if (!formulas.length) return;
    const style = document.createElement("link");
    Object.assign(style, { rel: "stylesheet", href: file("katex/katex.min.css") });
    document.head.append(style);
    await load("katex/katex.min.js");
    for (const formula of formulas) {
      const text = formula.textContent, display = text.startsWith("\\[");
      katex.render(text.slice(2, -2), formula, { displayMode: display, throwOnError: true });
    }
  }

  // What scrolls sideways, on a phone above all, can be reached and moved with the keyboard, and fades out where more follows.
  function reachable() {
    pictures();
    tables();
    for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .picture-scroll, div.arithmatex, pre > code")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      box.addEventListener("scroll", fade); // the same function once only
      fade({ target: box });
    }
  }
  const fade = ({ target: box }) => box.toggleAttribute("data-more", box.scrollLeft + box.clientWidth < box.scrollWidth - 2);

  // A wide picture would have letters of three to six pixels on a phone: there it scrolls, at three quarters of its size.
  function pictures() {
    if (!matchMedia("(max-width: 44.98em)").matches) return;
    for (const picture of document.querySelectorAll(".md-content img")) {
      if (picture.naturalWidth < 600 || picture.closest(".picture-scroll")) continue;
      const box = document.createElement("div");
      box.className = "picture-scroll";
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", "a picture that scrolls sideways");
      box.style.setProperty("--natural-width", `${picture.naturalWidth}px`);
      picture.replaceWith(box);
      box.append(picture);
    }
  }

  // A table with much text in each row would have columns of a few letters on a phone: there it is wider than the screen.
  function tables() {
    for (const table of document.querySelectorAll(".md-typeset__table > table")) {
      const widest = [];
      for (const row of table.rows) for (const cell of row.cells) {
        widest[cell.cellIndex] = Math.max(widest[cell.cellIndex] ?? 0, cell.textContent.length);
      }
      table.toggleAttribute("data-roomy", widest.length > 2 && widest.reduce((a, b) => a + b, 0) > 200);
      table.style.setProperty("--columns", widest.length);
    }
  }

  // A long name in a cell may end its line behind a dot or a stroke inside of it, and nowhere else.
  for (const code of document.querySelectorAll(".md-content td code")) {
    if (code.children.length) continue;
    const parts = code.textContent.split(/(?<=\w[./=-]|[a-zA-Z0-9]_)(?!_)/);
    code.replaceChildren(...parts.flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part])));
  }
  // The two strokes of an option stay together with its name.
  for (const code of document.querySelectorAll(".md-content :is(p, li, td) code")) {
    for (const text of [...code.childNodes].filter(node => node.nodeType === Node.TEXT_NODE && node.data.includes("--"))) {
      text.replaceWith(...text.data.split(/(?<![\w-])(--[\w-]+)/).map((part, i) => {
        if (i % 2 === 0) return part;
        const option = document.createElement("span");
        option.className = "option";
        option.textContent = part;
        return option;
      }));
    }
  }

  // The frame of the explorer has the height of its page, the colours of the site, and the state of this page's address.
  function explorer() {
    const frame = document.querySelector("iframe[src$='explorer.html']");
    if (!frame) return;
    const scheme = () => (document.body.dataset.mdColorScheme === "slate" ? "dark" : "light");
    const tell = () => frame.contentWindow.postMessage({ bandpo: "scheme", scheme: scheme() }, "*");
    addEventListener("message", event => {
      if (event.source !== frame.contentWindow || event.data?.bandpo !== "height") return;
      frame.style.height = `${Math.ceil(event.data.height)}px`;
    });
    frame.addEventListener("load", tell);
    new MutationObserver(tell).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
    if (location.hash.includes("=")) frame.src += location.hash;
    tell();
  }

  // ---- the zoo ----
  const FIELDS = ["name", "formula", "region × surrogate × aggregation", "advantage, anchor", "paper", "elsewhere"];
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const copy = cell => [...cell.cloneNode(true).childNodes];

  function rowsOf(tables) {
    return tables.flatMap(({ table, family }) => [...table.tBodies[0].rows].map(row => {
      const [picture, ...cells] = row.cells;
      return { family, picture: picture.querySelector("img"), cells, text: row.textContent.toLowerCase() };
    }));
  }

  function card({ picture, cells }) {
    const [name, formula, ...others] = cells, facts = document.createElement("dl");
    const fact = (label, ...content) => facts.append(make("dt", { textContent: label }), make("dd", {}, ...content));
    others.forEach((cell, i) => { if (cell.textContent.trim() !== "–") fact(FIELDS[i + 2], ...copy(cell)); });
    const shown = picture.cloneNode();
    shown.loading = "lazy";
    return make("li", {}, shown, make("p", { className: "zoo-name" }, ...copy(name)), make("p", {}, ...copy(formula)), facts);
  }

  function sortable(rows) {
    const names = [...FIELDS.slice(0, 1), "family", ...FIELDS.slice(1)];
    const heads = names.map(text => make("th", { scope: "col" }, make("button", { type: "button", textContent: text })));
    const body = make("tbody"), table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
    const lines = rows.map(row => ({ row, line: make("tr", {}, ...[copy(row.cells[0]), [row.family], ...row.cells.slice(1).map(copy)]
      .map(content => make("td", {}, ...content))) }));
    body.append(...lines.map(({ line }) => line));
    heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
      const down = head.ariaSort === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.ariaSort = down ? "descending" : "ascending";
      const key = ({ line }) => line.cells[i].textContent.toLowerCase();
      lines.sort((a, b) => key(a).localeCompare(key(b)) * (down ? -1 : 1));
      body.append(...lines.map(({ line }) => line));
    }));
    const scroll = make("div", { className: "md-typeset__scrollwrap zoo-table", tabIndex: 0 }, make("div", { className: "md-typeset__table" }, table));
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "All objectives as a table");
    return { element: scroll, lines };
  }

  function zoo() {
    const content = document.querySelector("article.md-content__inner");
    const tables = [...(content?.querySelectorAll("table") ?? [])]
      .filter(table => table.tBodies[0]?.rows[0]?.cells[0]?.querySelector("img[src*='assets/zoo/']"))
      .map(table => ({ table, family: headingBefore(table) }));
    if (!tables.length) return;
    content.dataset.zoo = "";
    const rows = rowsOf(tables), table = sortable(rows);
    const lists = tables.map(({ table: old, family }) => {
      const own = rows.filter(row => row.family === family);
      const items = own.map(row => ({ row, item: card(row) }));
      const list = make("ul", { className: "zoo-cards" }, ...items.map(({ item }) => item));
      const block = old.closest(".md-typeset__scrollwrap") ?? old;
      block.before(list);
      block.hidden = true;
      return { list, items };
    });
    const filter = make("input", { type: "search", id: "zoo-filter", placeholder: "clip, arXiv number, TRL …" });
    const count = make("output", { htmlFor: "zoo-filter" });
    const views = ["cards", "table"].map(name => make("button", { type: "button", textContent: name[0].toUpperCase() + name.slice(1) }));
    const controls = make("div", { className: "zoo-controls" }, ...views, make("label", {}, "Filter", filter), count);
    controls.setAttribute("role", "group");
    controls.setAttribute("aria-label", "How the objectives are shown");
    const first = tables[0].table;
    headingElement(first).before(controls, table.element);

    const show = view => {
      views.forEach((button, i) => button.setAttribute("aria-pressed", String(["cards", "table"][i] === view)));
      table.element.hidden = view !== "table";
      lists.forEach(({ list }) => { list.hidden = view !== "cards"; headingElement(list).hidden = view !== "cards"; });
      narrow();
    };
    const narrow = () => {
      const wanted = filter.value.trim().toLowerCase(), cards = views[0].getAttribute("aria-pressed") === "true";
      const has = row => row.text.includes(wanted) || row.family.toLowerCase().includes(wanted);
      table.lines.forEach(({ row, line }) => { line.hidden = !has(row); });
      for (const { list, items } of lists) {
        items.forEach(({ row, item }) => { item.hidden = !has(row); });
        const any = items.some(({ item }) => !item.hidden);
        list.hidden = !cards || !any;
        headingElement(list).hidden = !cards || !any;
      }
      count.textContent = `${rows.filter(has).length} of ${rows.length} objectives`;
    };
    filter.addEventListener("input", narrow);
    views.forEach((button, i) => button.addEventListener("click", () => show(["cards", "table"][i])));
    show("cards");
  }

  function headingElement(element) {
    let at = element.closest(".md-typeset__scrollwrap") ?? element;
    while (at && !/^H[2-3]$/.test(at.tagName)) at = at.previousElementSibling;
    return at;
  }
  const headingBefore = element => [...headingElement(element).childNodes].filter(n => n.nodeType === 3).map(n => n.textContent).join("").trim();

  zoo();
  explorer();
  typeset().then(reachable);
  new ResizeObserver(reachable).observe(document.body);
})();
