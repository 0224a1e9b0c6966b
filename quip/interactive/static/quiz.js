const start = (root) => {
  const make = (tag, props = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), props);
    element.append(...children);
    return element;
  };
  const score = make("p", { className: "soft" });
  const results = [];
  const count = () => {
    const done = results.filter((result) => result.found);
    const first = done.filter((result) => !result.missed).length;
    score.textContent = `${done.length} of ${results.length} answered right, ${first} at the first try.`;
  };

  for (const question of root.querySelectorAll(".question")) {
    const [choices, reasons] = [...question.querySelectorAll("ol")].map((list) => [...list.children]);
    const rights = reasons.filter((reason) => "right" in reason.dataset).length;
    const type = rights > 1 ? "checkbox" : "radio";
    const result = { found: false, missed: false };
    results.push(result);
    const legend = make("legend", {}, ...question.querySelector("p").childNodes);
    if (rights > 1) legend.append(" ", make("span", { className: "soft" }, `(${rights} are right)`));
    const set = make("fieldset", {}, legend);
    // Explanations stand in the page only while they are chosen, so that they are read out when they appear.
    const entries = choices.map((choice, k) => {
      const input = make("input", { type, name: "choice" });
      const label = make("label", {}, input, make("span", {}, ...choice.childNodes));
      const why = make("div", { className: "why" });
      why.setAttribute("role", "status");
      set.append(label, why);
      return { input, label, why, right: "right" in reasons[k].dataset, text: [...reasons[k].childNodes] };
    });
    const show = () => {
      for (const { input, label, why, right, text } of entries) {
        label.className = input.checked ? (right ? "yes" : "no") : "";
        if (input.checked !== why.hasChildNodes()) why.replaceChildren(...(input.checked ? text : []));
        if (input.checked && !right && !result.found) result.missed = true;
      }
      result.found ||= entries.every(({ input, right }) => input.checked || !right);
      count();
    };
    // A form of its own keeps the radio buttons of each question together, and Enter must not send it.
    const form = make("form", { autocomplete: "off" }, set);
    form.addEventListener("change", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    question.replaceChildren(form);
  }
  count();
  root.append(score);
};
