const start = (root) => {
  const { gpus, weights: first, bits: width, perLayer, cacheBytes } = JSON.parse(root.querySelector("script").textContent);
  const make = (tag, props = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), props);
    element.append(...children);
    return element;
  };
  const slider = (name, min, max, step, value) => {
    const output = make("b");
    const input = make("input", { type: "range", min, max, step, value });
    return { input, output, label: make("label", {}, `${name}: `, output, input) };
  };
  const three = (value) => String(Number(value.toPrecision(3)));
  const count = (n) => (n < 1e9 ? `${three(n / 1e6)} million` : n < 1e12 ? `${three(n / 1e9)} billion` : `${three(n / 1e12)} trillion`);
  const gigabytes = (value) => `${value < 100 ? value.toFixed(1) : value.toFixed(0)} GB`;

  // The slider of the number of weights is logarithmic.
  const weights = slider("Weights", 8, 12, 0.01, Math.log10(first));
  const bits = slider("Bits per weight", 1, 16, 1, width);
  const tokens = slider("Tokens in the KV cache", 0, 8, 1, 0);
  const shared = make("input", { type: "checkbox" });
  let chosen = first;
  const presets = make("div", { className: "presets" });
  for (const [text, n] of [["135 M", 135e6], ["7 B", 7e9], ["13 B", 13e9], ["30 B", 30e9], ["70 B", 70e9], ["175 B", 175e9]]) {
    const button = make("button", { type: "button", textContent: text });
    button.setAttribute("aria-label", `${count(n)} weights`);
    button.addEventListener("click", () => {
      weights.input.value = Math.log10(n);
      chosen = n;
      draw();
    });
    presets.append(button);
  }
  const sharing = make("label", {}, shared, " eight heads share a key and a value");
  root.querySelector(".controls").append(make("div", {}, weights.label, presets), bits.label, tokens.label, sharing);

  root.querySelector("thead .bar").textContent = "memory";
  const most = Math.max(...gpus.map(([memory]) => memory));
  const svg = (tag, props) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
    return element;
  };
  const bar = (memory, size, total) => {
    const picture = svg("svg", { viewBox: "0 0 100 26", preserveAspectRatio: "none", "aria-hidden": "true" });
    const scale = (value) => (99 * value) / most;
    const box = (className, from, to) =>
      svg("rect", { class: className, x: scale(from), y: 5, height: 16, width: Math.max(scale(to) - scale(from), 0), "vector-effect": "non-scaling-stroke" });
    picture.append(box("used", 0, Math.min(size, memory)), box("cache", Math.min(size, memory), Math.min(total, memory)), box("room", 0, memory));
    if (total <= most * 1.005)
      picture.append(svg("line", { class: "need", x1: scale(total), x2: scale(total), y1: 0, y2: 26, "vector-effect": "non-scaling-stroke" }));
    return picture;
  };

  const draw = () => {
    const layers = (chosen / (12 * perLayer ** 2)) ** (1 / 3);
    const steps = Number(tokens.input.value);
    const length = steps && 2 ** (steps + 9);
    const b = Number(bits.input.value);
    const perToken = (2 * cacheBytes * layers * layers * perLayer) / (shared.checked ? 8 : 1);
    const size = (chosen * b) / 8e9;
    const cacheSize = (perToken * length) / 1e9;
    const total = size + cacheSize;
    weights.output.textContent = count(chosen);
    weights.input.setAttribute("aria-valuetext", count(chosen));
    bits.output.textContent = b;
    tokens.output.textContent = length;
    tokens.input.setAttribute("aria-valuetext", length);
    const fitting = gpus.filter(([memory]) => total < memory).length;
    let text = `${count(chosen)} weights of ${b} ${b === 1 ? "bit" : "bits"} take ${gigabytes(size)}`;
    if (length) text += `, the KV cache another ${gigabytes(cacheSize)}`;
    text += `. ${fitting === 0 ? "No card here holds" : fitting === gpus.length ? "All cards hold" : `${fitting} of ${gpus.length} cards hold`} that.`;
    root.querySelector(".sum").textContent = text;
    root.querySelectorAll("tbody tr").forEach((row, k) => {
      const [memory, bandwidth] = gpus[k];
      const fits = total < memory;
      row.className = fits ? "" : "over";
      row.cells[1].replaceChildren(bar(memory, size, total));
      row.cells[2].textContent = fits ? (memory - total).toFixed(1) : "–";
      row.cells[3].textContent = fits ? (bandwidth / total).toFixed(1) : "–";
    });
  };
  weights.input.addEventListener("input", () => {
    chosen = 10 ** Number(weights.input.value);
  });
  root.querySelector(".controls").addEventListener("input", draw);
  draw();
};
