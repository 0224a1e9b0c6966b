const start = (root) => {
  const { filters } = JSON.parse(root.querySelector("script").textContent);
  const body = root.querySelector("tbody");
  const headers = [...root.querySelectorAll("thead th")];
  const rows = [...body.rows];
  const text = (row, k) => row.cells[k].textContent;
  const make = (tag, props, ...children) => {
    const element = Object.assign(document.createElement(tag), props);
    element.append(...children);
    return element;
  };

  // A cell's key: numbers before text, a dash last whichever way one sorts.
  const key = (row, k) => {
    const value = row.cells[k].dataset.v;
    return value === undefined ? text(row, k) : Number(value);
  };
  const compare = (a, b) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  };
  const sort = (k) => {
    const down = headers[k].getAttribute("aria-sort") === "ascending";
    headers.forEach((header) => header.removeAttribute("aria-sort"));
    headers[k].setAttribute("aria-sort", down ? "descending" : "ascending");
    const sorted = rows.map((row, i) => [key(row, k), i, row]);
    sorted.sort(([a, i], [b, j]) => {
      if (a === "–" || b === "–") return (a === "–") - (b === "–") || i - j;
      return (down ? compare(b, a) : compare(a, b)) || i - j;
    });
    body.append(...sorted.map((entry) => entry[2]));
  };
  headers.forEach((header, k) => {
    const button = make("button", { type: "button", title: "Sort by this column" }, ...header.childNodes);
    button.addEventListener("click", () => sort(k));
    header.append(button);
  });

  const search = make("input", { type: "search" });
  const count = make("span", { className: "soft" });
  count.setAttribute("role", "status");
  const selects = filters.map((k) => {
    const values = [...new Set([...rows].sort((a, b) => compare(key(a, k), key(b, k))).map((row) => text(row, k)))];
    const select = make("select", {}, new Option("all", ""), ...values.map((value) => new Option(value, value)));
    return [k, select];
  });
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const all = [...row.cells].map((cell) => cell.textContent.toLowerCase()).join(" ");
      const fits = ([k, select]) => !select.value || text(row, k) === select.value;
      row.hidden = !(words.every((word) => all.includes(word)) && selects.every(fits));
      shown += !row.hidden;
    }
    count.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
  };
  const bar = make("div", { className: "bar" }, make("label", {}, "Search", search));
  for (const [k, select] of selects) bar.append(make("label", {}, text(root.querySelector("thead tr"), k), select));
  bar.append(count);
  bar.addEventListener("input", filter);
  root.prepend(bar);
};
