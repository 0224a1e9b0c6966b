const start = (root) => {
  const { rows, x: first } = JSON.parse(root.querySelector("script").textContent);
  const unique = (key) => [...new Set(rows.map((row) => row[key]))];
  const methods = unique("method");
  const widths = unique("bits").sort((a, b) => a - b);
  const colour = (row) => `var(--s${methods.indexOf(row.method) % 10})`;
  const reported = (row) => row.source !== "measured";
  const size = (row) => (row.parameters * row.bits) / 8;
  const three = (value) => String(Number(value.toPrecision(3)));
  const scaled = (value, names) => {
    const k = Math.min(Math.max(Math.floor(Math.log10(value) / 3), 0), names.length - 1);
    return `${three(value / 1000 ** k)}${names[k]}`;
  };
  const axes = {
    size: { name: "size of the weights", of: size, text: (v) => scaled(v, [" B", " kB", " MB", " GB", " TB"]) },
    parameters: { name: "number of weights", of: (row) => row.parameters, text: (v) => scaled(v, ["", " k", " M", " B"]) },
  };

  const svg = (tag, props = {}, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  // One shape for each width, filled for what was measured.
  const shapes = [
    "M-5-4H5L0 5Z", "M-4.3-4.3H4.3V4.3H-4.3Z", "M0-6L6 0L0 6L-6 0Z", "M-5 4H5L0-5Z",
    "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z", "M-6-2H-2V-6H2V-2H6V2H2V6H-2V2H-6Z",
  ];
  const shape = (bits) => shapes[{ 2: 0, 3: 1, 4: 2, 8: 3, 16: 4 }[bits] ?? 5];
  const mark = (bits, stroke, hollow, props = {}) =>
    svg("path", { d: shape(bits), stroke, fill: hollow ? "none" : stroke, "stroke-width": 1.8, ...props });

  const off = { method: new Set(), bits: new Set(), source: new Set() };
  let axis = first;
  let points = [];
  let current = null;
  let drawnAt = 0;
  const plot = root.querySelector(".plot");
  const read = root.querySelector(".read");
  const controls = root.querySelector(".controls");
  const hint = "Point at a mark, or choose the chart and use the arrow keys, to read its values.";

  const choice = (title, entries) => {
    const group = document.createElement("div");
    const bold = Object.assign(document.createElement("b"), { textContent: title });
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", title);
    group.append(bold, ...entries);
    controls.append(group);
  };
  const box = (type, text, checked, picture, act) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type, checked });
    input.addEventListener("change", () => {
      act(input);
      draw();
    });
    label.append(input, " ", ...(picture ? [svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, picture)] : []), text);
    return label;
  };
  const toggles = (key, values, text, picture) =>
    values.map((value) =>
      box("checkbox", text(value), true, picture(value), (input) => off[key][input.checked ? "delete" : "add"](value)),
    );

  const line = (members, path) => {
    const at = members.map(path);
    const props = { fill: "none", stroke: colour(members[0]), "stroke-width": 1.5 };
    if (reported(members[0])) props["stroke-dasharray"] = "5 4";
    return svg("polyline", { points: at.map((p) => p.join()).join(" "), ...props });
  };
  // The rows that one line joins, in order.
  const series = (shown) => {
    const groups = new Map();
    for (const row of shown) {
      const key = JSON.stringify(
        axis === "size" ? [row.source, row.model, row.method] : [row.source, row.family, row.method, row.bits],
      );
      groups.set(key, [...(groups.get(key) || []), row]);
    }
    const lines = [...groups.values()].map((members) => {
      if (axis !== "size") return members;
      const peers = shown.filter((row) => row.source === members[0].source && row.model === members[0].model);
      const top = peers.reduce((a, b) => (b.bits > a.bits ? b : a));
      return members.some((row) => row.bits === top.bits) ? members : [...members, top];
    });
    return lines.map((members) => [...members].sort((a, b) => axes[axis].of(a) - axes[axis].of(b)));
  };
  const ticks = (low, high) => {
    const wide = high - low > 2.2;
    const all = [];
    for (let k = Math.floor(low); k <= high; k += 1)
      for (const step of wide ? [1] : [1, 2, 5]) all.push(Math.log10(step) + k);
    return all.filter((tick) => tick >= low && tick <= high);
  };
  const range = (values, pad) => {
    const logs = values.map(Math.log10);
    return [Math.min(...logs) - pad, Math.max(...logs) + pad];
  };

  const choose = (point, speak = true) => {
    plot.querySelectorAll(".on").forEach((element) => element.remove());
    current = point;
    if (!point) return;
    const { row, x, y, width } = point;
    const right = x > width * 0.7;
    const ring = svg("circle", { class: "on", cx: x, cy: y, r: 9, fill: "none", stroke: "currentColor", "stroke-width": 1.5 });
    const props = { class: "on", x: x + (right ? -13 : 13), y: y - 8, "text-anchor": right ? "end" : "start", "font-weight": 600 };
    plot.firstChild.append(ring, svg("text", props, String(row.perplexity)));
    if (!speak) return;
    const origin = reported(row) ? `reported by ${row.source}, not measured here` : "measured by this project";
    const bits = `${row.bits} ${row.bits === 1 ? "bit" : "bits"}`;
    const amount = `${axes.parameters.text(row.parameters)} weights, ${axes.size.text(size(row))}`;
    read.textContent = `${row.model}, ${row.method}, ${bits}: perplexity ${row.perplexity} (${amount}; ${origin}).`;
  };

  const draw = () => {
    drawnAt = plot.clientWidth;
    const width = Math.max(drawnAt, 280);
    const height = Math.min(420, Math.max(300, width * 0.62));
    const [left, bottom, top, right] = [70, 46, 14, 16];
    const keep = current && current.row;
    const shown = rows.filter((row) => Object.keys(off).every((key) => !off[key].has(row[key])));
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "application" });
    picture.setAttribute("aria-label", `Perplexity against ${axes[axis].name}, ${shown.length} points; arrow keys read them out`);
    plot.replaceChildren(picture);
    points = [];
    if (!shown.length) {
      picture.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "Nothing is switched on."));
      read.textContent = "";
      return;
    }
    const { of, text, name } = axes[axis];
    const [x0, x1] = range(shown.map(of), 0.15);
    const [y0, y1] = range(shown.map((row) => row.perplexity), 0.08);
    const at = (lx, ly) => [
      left + ((lx - x0) / (x1 - x0)) * (width - left - right),
      height - bottom - ((ly - y0) / (y1 - y0)) * (height - bottom - top),
    ];
    const place = (row) => at(Math.log10(of(row)), Math.log10(row.perplexity));
    let last = -Infinity;
    for (const tick of ticks(x0, x1)) {
      const [x] = at(tick, y0);
      picture.append(svg("line", { class: "grid", x1: x, x2: x, y1: top, y2: height - bottom }));
      if (x - last > 52) {
        picture.append(svg("text", { x, y: height - bottom + 18, "text-anchor": "middle" }, text(10 ** tick)));
        last = x;
      }
    }
    for (const tick of ticks(y0, y1)) {
      const y = at(x0, tick)[1];
      picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }));
      picture.append(svg("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, scaled(10 ** tick, ["", " k", " M", " B"])));
    }
    picture.append(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, name));
    const turned = { x: 0, y: 0, transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" };
    picture.append(svg("text", turned, "perplexity"));
    picture.append(...series(shown).filter((members) => members.length > 1).map((members) => line(members, place)));
    for (const row of shown) {
      const [x, y] = place(row);
      picture.append(mark(row.bits, colour(row), reported(row), { transform: `translate(${x} ${y})` }));
      points.push({ row, x, y, width });
    }
    points.sort((a, b) => a.x - b.x || b.y - a.y);
    const kept = points.find((point) => point.row === keep);
    if (!kept) read.textContent = hint;
    choose(kept || null, false);

    picture.addEventListener("pointermove", (event) => {
      const frame = picture.getBoundingClientRect();
      const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
      const far = (point) => Math.hypot(point.x - x, point.y - y);
      const near = points.reduce((a, b) => (far(b) < far(a) ? b : a));
      if (far(near) < 40 && near !== current) choose(near);
    });
    picture.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const k = current ? points.indexOf(current) + step : step > 0 ? 0 : points.length - 1;
      choose(points[(k + points.length) % points.length]);
    });
  };

  choice("Method", toggles("method", methods, (m) => m, (m) =>
    svg("path", { d: "M-8 0H8", stroke: colour({ method: m }), "stroke-width": 3 })));
  choice("Bits", toggles("bits", widths, String, (bits) => mark(bits, "currentColor", false)));
  choice("Source", toggles("source", unique("source"), (s) => (s === "measured" ? "measured here" : `${s} (reported)`), (s) =>
    mark(16, "currentColor", s !== "measured")));
  const buttons = Object.keys(axes).map((key) =>
    box("radio", axes[key].name, key === axis, null, () => {
      axis = key;
      buttons.forEach((button, k) => (button.firstChild.checked = Object.keys(axes)[k] === key));
    }),
  );
  choice("Axis", buttons);
  root.querySelector("details").open = false;
  draw();
  // In the next frame: drawing changes the height of what is observed.
  new ResizeObserver(() => requestAnimationFrame(() => plot.clientWidth !== drawnAt && draw())).observe(plot);
};
