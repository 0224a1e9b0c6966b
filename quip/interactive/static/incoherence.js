// numpy's RandomState: MT19937, with the draws that `quip.incoherence` makes from it.
const generator = (seed) => {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let k = 1; k < 624; k += 1) state[k] = Math.imul(1812433253, state[k - 1] ^ (state[k - 1] >>> 30)) + k;
  let place = 624;
  let spare = null;
  const integer = () => {
    if (place === 624) {
      for (let k = 0; k < 624; k += 1) {
        const y = (state[k] & 0x80000000) | (state[(k + 1) % 624] & 0x7fffffff);
        state[k] = state[(k + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      place = 0;
    }
    let y = state[place];
    place += 1;
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
  const uniform = () => ((integer() >>> 5) * 67108864 + (integer() >>> 6)) / 9007199254740992;
  const normal = () => {
    if (spare !== null) {
      const value = spare;
      spare = null;
      return value;
    }
    for (;;) {
      const [x, y] = [2 * uniform() - 1, 2 * uniform() - 1];
      const r = x * x + y * y;
      if (r < 1 && r !== 0) {
        const f = Math.sqrt((-2 * Math.log(r)) / r);
        spare = f * x;
        return f * y;
      }
    }
  };
  const permutation = (n) => {
    const order = Array.from({ length: n }, (_, k) => k);
    for (let k = n - 1; k > 0; k -= 1) {
      const mask = 2 ** (32 - Math.clz32(k)) - 1;
      let j;
      do j = (integer() & mask) >>> 0;
      while (j > k);
      [order[k], order[j]] = [order[j], order[k]];
    }
    return order;
  };
  return { normal, permutation };
};

// Haar: the Q of a Gaussian's QR with a positive diagonal, by Gram and Schmidt, each column twice. Rows of numbers.
const haar = (n, random) => {
  const A = Array.from({ length: n }, () => Array.from({ length: n }, random.normal));
  const columns = [];
  for (let j = 0; j < n; j += 1) {
    let v = A.map((row) => row[j]);
    for (const q of [...columns, ...columns]) {
      const inner = q.reduce((sum, x, i) => sum + x * v[i], 0);
      v = v.map((x, i) => x - inner * q[i]);
    }
    const norm = Math.hypot(...v);
    columns.push(v.map((x) => x / norm));
  }
  return A.map((_, i) => columns.map((q) => q[i]));
};

// x ↦ (L ⊗ R) P x, the factors' widths the divisors nearest √n.
const kronecker = (n, seed, permute = true) => {
  let p = Math.floor(Math.sqrt(n));
  while (n % p) p -= 1;
  const q = n / p;
  const random = generator(seed);
  const order = random.permutation(n);
  const [L, R] = [haar(p, random), haar(q, random)];
  const dot = (row, of) => row.reduce((sum, a, k) => sum + a * of(k), 0);
  return (x) => {
    const z = permute ? order.map((k) => x[k]) : x;
    const folded = L.map((_, i) => R.map((row) => dot(row, (k) => z[i * q + k])));
    return L.flatMap((row) => R.map((_, j) => dot(row, (k) => folded[k][j])));
  };
};

const transpose = (W) => W[0].map((_, j) => W.map((row) => row[j]));
const turn = (W, seed, permute) =>
  transpose(transpose(W.map(kronecker(W[0].length, seed, permute))).map(kronecker(W.length, seed + 1, permute)));

const outliers = ({ m, n, weightSeed }, { lone, columns, size }, seed) => {
  const random = generator(weightSeed + seed);
  const W = Array.from({ length: m }, () => Array.from({ length: n }, random.normal));
  for (const j of random.permutation(n).slice(0, columns)) for (const row of W) row[j] *= Math.max(size / 3, 1);
  for (const k of random.permutation(m * n).slice(0, lone))
    W[Math.floor(k / n)][k % n] = size * Math.sign(W[Math.floor(k / n)][k % n]);
  return W;
};

// Entries in units of their RMS, the largest of them (μ), and the error of four levels at the best reach.
const measure = (W, { firstReach, reachStep }) => {
  const all = W.flat();
  const rms = Math.sqrt(all.reduce((sum, x) => sum + x * x, 0) / all.length);
  const scaled = all.map((x) => x / rms);
  const mu = scaled.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  let error = Infinity;
  for (let k = 0; firstReach + k * reachStep < mu + reachStep; k += 1) {
    const t = firstReach + k * reachStep;
    const step = (2 * t) / 3;
    let sum = 0;
    for (const x of scaled) {
      const code = Math.min(Math.max(Math.round((x + t) / step), 0), 3);
      sum += (code * step - t - x) ** 2;
    }
    error = Math.min(error, sum / scaled.length);
  }
  return { scaled, mu, rms, error };
};

const start = (root) => {
  const setup = JSON.parse(root.querySelector("script").textContent);
  const make = (tag, props = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), props);
    element.append(...children);
    return element;
  };
  const svg = (tag, props, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const controls = root.querySelector(".controls");
  const sliders = {};
  for (const [name, text] of [["lone", "Lone outliers"], ["columns", "Heavy columns"], ["size", "Their size"]]) {
    const output = make("b");
    const input = make("input", { type: "range", min: name === "size" ? 1 : 0, max: setup.most[name], value: setup[name] });
    controls.append(make("label", {}, `${text}: `, output, input));
    sliders[name] = { input, output };
  }
  const seeds = { matrix: 0, transform: 0 };
  const another = (name) => {
    const button = make("button", { type: "button", textContent: `Another ${name}` });
    button.addEventListener("click", () => {
      seeds[name] += name === "matrix" ? 1 : 2;
      draw();
    });
    return button;
  };
  const check = (text) => {
    const input = make("input", { type: "checkbox", checked: true });
    return [input, make("label", {}, input, ` ${text}`)];
  };
  const [on, onLabel] = check("transform");
  const [permute, permuteLabel] = check("with its permutation");
  controls.append(make("div", { className: "switches" }, onLabel, permuteLabel, another("matrix"), another("transform")));

  // Dark to bright, in even steps of lightness, so that it also reads in grey.
  const stops = [[13, 8, 35], [74, 28, 98], [150, 46, 96], [222, 94, 62], [249, 168, 58], [252, 246, 190]];
  const most = 6;
  const colour = (size) => {
    const place = Math.min(size / most, 1) * (stops.length - 1);
    const k = Math.min(Math.floor(place), stops.length - 2);
    return stops[k].map((from, c) => from + (place - k) * (stops[k + 1][c] - from));
  };
  const maps = ["W, before", "U W Vᵀ, after"].map((name) => {
    const canvas = make("canvas", { width: setup.n, height: setup.m });
    canvas.setAttribute("role", "img");
    const caption = make("figcaption");
    root.querySelector(".maps").append(make("figure", {}, canvas, caption));
    return (result) => {
      const context = canvas.getContext("2d");
      const picture = context.createImageData(setup.n, setup.m);
      result.scaled.forEach((x, k) => picture.data.set([...colour(Math.abs(x)), 255], 4 * k));
      context.putImageData(picture, 0, 0);
      caption.textContent = `${name}: μ = ${result.mu.toFixed(2)}`;
      canvas.setAttribute("aria-label", `Sizes of the entries of ${name}: the largest is ${result.mu.toFixed(2)} times the root mean square.`);
    };
  });
  const bar = make("i");
  bar.style.background = `linear-gradient(to right, ${stops.map((stop) => `rgb(${stop})`).join()})`;
  const scale = make("div", { className: "scale" }, "0", bar, `${most} and more, size of an entry over the RMS`);
  root.querySelector(".maps").after(scale);

  const plot = root.querySelector(".histogram");
  let drawnAt = 0;
  const histogram = (results) => {
    drawnAt = plot.clientWidth;
    const [width, height, left, bottom, top] = [Math.max(drawnAt, 280), 190, 46, 40, 8];
    const right = Math.max(8, Math.ceil(results[0].mu), Math.ceil(results[1].mu));
    const bins = 4 * right;
    const x = (size) => left + (size / right) * (width - left - 12);
    const y = (count) => height - bottom - (Math.log10(Math.max(count, 0.5) / 0.5) / Math.log10(4000)) * (height - bottom - top);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    picture.setAttribute("aria-label", `Histograms of the entries' sizes: before they reach ${results[0].mu.toFixed(1)}, after ${results[1].mu.toFixed(1)} times the RMS.`);
    for (const count of [1, 10, 100, 1000]) {
      picture.append(svg("line", { class: "axis", x1: left, x2: width - 12, y1: y(count), y2: y(count) }));
      picture.append(svg("text", { x: left - 6, y: y(count) + 4, "text-anchor": "end" }, String(count)));
    }
    const step = Math.max(1, Math.ceil(right / 10));
    for (let size = 0; size <= right; size += step)
      picture.append(svg("text", { x: x(size), y: height - bottom + 17, "text-anchor": "middle" }, String(size)));
    const name = "size of an entry over the RMS";
    picture.append(svg("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, name));
    const paths = results.map(({ scaled }) => {
      const counts = new Array(bins).fill(0);
      for (const value of scaled) counts[Math.min(Math.floor(Math.abs(value) * 4), bins - 1)] += 1;
      return `M${x(0)} ${y(0)}${counts.map((c, k) => `L${x(k / 4)} ${y(c)}L${x((k + 1) / 4)} ${y(c)}`).join("")}L${x(right)} ${y(0)}`;
    });
    picture.append(svg("path", { class: "after", d: paths[1] }), svg("path", { class: "before", d: paths[0] }));
    ["W", "U W Vᵀ"].forEach((text, k) => {
      const box = { class: k ? "after" : "before", x: width - 95, y: top + 6 + 20 * k, width: 18, height: 12 };
      picture.append(svg("rect", box), svg("text", { x: width - 70, y: top + 17 + 20 * k }, text));
    });
    plot.replaceChildren(picture);
  };

  let results = [];
  const cells = [...root.querySelectorAll("tbody tr")].map((row) => [row.cells[1], row.cells[2]]);
  const draw = () => {
    const settings = {};
    for (const [name, { input, output }] of Object.entries(sliders)) {
      settings[name] = Number(input.value);
      output.textContent = name === "size" ? `${input.value}, columns ${Math.max(settings.size / 3, 1).toFixed(1)}` : input.value;
    }
    permute.disabled = !on.checked;
    const W = outliers(setup, settings, seeds.matrix);
    results = [W, on.checked ? turn(W, seeds.transform, permute.checked) : W].map((X) => measure(X, setup));
    results.forEach((result, k) => {
      maps[k](result);
      cells[0][k].textContent = result.mu.toFixed(2);
      cells[1][k].textContent = `${(100 * result.error).toFixed(1)}%`;
    });
    histogram(results);
  };
  controls.addEventListener("input", draw);
  draw();
  // In the next frame: drawing may change the size of what is observed.
  new ResizeObserver(() => requestAnimationFrame(() => plot.clientWidth !== drawnAt && histogram(results))).observe(plot);
};
