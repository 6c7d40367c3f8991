"use strict";
(() => {
  const CONTEXT = 3; // equal lines that are shown around a change
  const at = (id) => document.getElementById(id);
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  const graphs = JSON.parse(at("graphs").textContent);
  const state = { graph: 0, step: 0, opened: new Set() };

  const element = (tag, kind, text) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // A colour for the name of a pass or of a site, the same one wherever it stands; those of passes lie far apart.
  const passes = [...new Set(graphs.flatMap((graph) => graph.steps.map((step) => step.name)))];
  const hue = (name) => {
    const place = passes.indexOf(name);
    return place < 0 ? [...name].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7) : (place * 137) % 360;
  };

  const coloured = (kind, text) => {
    const made = element("span", kind, text);
    made.style.setProperty("--hue", hue(text));
    return made;
  };

  // --- The graph after each pass ---

  const textOf = (graph, step) =>
    graph.steps[step].runs.flatMap(([first, count]) => graph.lines.slice(first, first + count));

  // Each line of the step with those that it took out: [kind, number, text].
  const rowsOf = (graph, step) => {
    const after = textOf(graph, step);
    const before = step ? textOf(graph, step - 1) : after;
    const rows = [];
    let line = 0;
    const equalUntil = (end) => { for (; line < end; line++) rows.push(["equal", line + 1, after[line]]); };
    for (const [start, end, first, last] of graph.steps[step].changes) {
      equalUntil(first);
      for (let old = start; old < end; old++) rows.push(["removed", old + 1, before[old]]);
      for (; line < last; line++) rows.push(["added", line + 1, after[line]]);
    }
    equalUntil(after.length);
    return rows;
  };

  const lineElement = ([kind, number, text]) => {
    const made = element("div", kind);
    made.append(element("span", "number", number));
    const [, name, type, call, pass, where] =
      /^(%\S+|return)?( : .*? = )?(.*?)(?:( {4}# \w+)(?: (.*))?)?$/.exec(text) || [];
    if (name) made.append(element("span", "name", name));
    if (type) made.append(element("span", "type", type));
    made.append(call === undefined ? text : call);
    if (pass) {
      made.append("    # ", coloured("pass", pass.replace("    # ", "")));
      if (where) made.append(" ", coloured("where", where));
    }
    return made;
  };

  // Rows near a change, the others folded into gaps that a click opens.
  const folded = (rows) => {
    const near = new Uint8Array(rows.length);
    rows.forEach(([kind], row) => {
      if (kind !== "equal") near.fill(1, Math.max(0, row - CONTEXT), row + CONTEXT + 1);
    });
    const shown = document.createDocumentFragment();
    for (let row = 0; row < rows.length; ) {
      if (near[row] || state.opened.has(row)) { shown.append(lineElement(rows[row++])); continue; }
      const start = row;
      while (row < rows.length && !near[row]) row++;
      const end = row;
      const gap = element("div", "gap", `⋯ ${end - start} equal lines`);
      gap.addEventListener("click", () => {
        const lines = document.createDocumentFragment();
        for (let each = start; each < end; each++) { state.opened.add(each); lines.append(lineElement(rows[each])); }
        gap.replaceWith(lines);
      });
      shown.append(gap);
    }
    return shown;
  };

  const showSteps = () => {
    const graph = graphs[state.graph];
    at("steps").replaceChildren(...(graph ? graph.steps : []).map((step, number) => {
      const added = step.changes.reduce((sum, change) => sum + change[3] - change[2], 0);
      const removed = step.changes.reduce((sum, change) => sum + change[1] - change[0], 0);
      const button = element("button", step.changes.length || !number ? "changed" : "");
      const dot = element("i", "dot");
      dot.style.setProperty("--hue", hue(step.name));
      button.append(dot, step.name);
      if (step.changes.length) button.append(element("span", "", `+${added} −${removed}`));
      button.dataset.step = step.name;
      button.setAttribute("aria-current", number === state.step);
      button.addEventListener("click", () => { state.step = number; state.opened.clear(); showSteps(); search(); });
      return button;
    }));
  };

  const showGraph = (query) => {
    const graph = graphs[state.graph];
    if (!graph) {
      at("code").replaceChildren(element("div", "", "The texts of the graph are not in this report."));
      return 0;
    }
    const rows = rowsOf(graph, state.step);
    const found = query ? rows.filter((row) => row[2].toLowerCase().includes(query)) : rows;
    const all = query || at("whole").checked || !state.step;
    if (!all && !graph.steps[state.step].changes.length) {
      at("code").replaceChildren(element("div", "", "This step changed nothing."));
    } else {
      const lines = document.createDocumentFragment();
      if (all) found.forEach((row) => lines.append(lineElement(row)));
      at("code").replaceChildren(all ? lines : folded(rows));
    }
    return found.length;
  };

  // --- Search ---

  const search = () => {
    const query = at("search").value.trim().toLowerCase();
    const panel = document.querySelector('[role="tabpanel"]:not([hidden])');
    let matches = 0;
    if (panel.id === "graph") matches = showGraph(query);
    for (const row of panel.querySelectorAll(".row")) {
      row.hidden = query !== "" && !row.textContent.toLowerCase().includes(query);
      if (!row.hidden) matches++;
      if (query && row.tagName === "DETAILS") row.open = !row.hidden;
    }
    at("matches").textContent = query ? `${matches} ${matches === 1 ? "match" : "matches"}` : "";
  };

  // --- Tabs ---

  const choose = (name) => {
    const chosen = tabs.find((tab) => tab.getAttribute("aria-controls") === name) || tabs[0];
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen);
      at(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
    search();
  };

  for (const tab of tabs) {
    // The tab stands in the address, so that it can be linked to; an id alone would be scrolled to.
    tab.addEventListener("click", () => { location.hash = `/${tab.getAttribute("aria-controls")}`; });
  }
  window.addEventListener("hashchange", () => choose(location.hash.slice(2)));
  at("search").addEventListener("input", search);
  at("whole").addEventListener("change", search);
  at("graph-choice").addEventListener("change", (event) => {
    state.graph = Number(event.target.value);
    state.step = 0;
    state.opened.clear();
    showSteps();
    search();
  });
  showSteps();
  choose(location.hash.slice(2));
})();
