// Panels made of text and boxes. Everything that a model or a user wrote goes in by textContent.

// An element with attributes and children; a child that is a text becomes a text node.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((one) => one !== null && one !== undefined));
  return element;
}

function fill(element, ...children) {
  element.replaceChildren(...children.filter((one) => one !== null && one !== undefined));
}

const KINDS = {
  object: "object in the image", hallucinated: "hallucinated object", correct: "right answer", wrong: "wrong answer",
};

// Names of the objects that a text mentions, each marked by a line and a word, not by colour alone.
function markedText(text, mentions) {
  const parts = [];
  let place = 0;
  for (const [start, end, category, present] of mentions) {
    parts.push(text.slice(place, start));
    const kind = present ? "object" : "hallucinated";
    parts.push(make("span", { class: `mark ${kind}`, title: `${category}: ${KINDS[kind]}` }, text.slice(start, end),
      present ? null : make("span", { class: "cross" }, "✕")));
    place = end;
  }
  parts.push(text.slice(place));
  return parts.filter((one) => one !== "");
}

// The lens: per layer the likeliest tokens, and the rank and probability of the token that was generated.
function lensTable(item, token, layer) {
  const { lens_id: ids, lens_p: shares, rank, p } = item.arrays;
  const own = item.tokens[token][1];
  const head = make("tr", {}, make("th", { scope: "col" }, "after"),
    make("th", { scope: "col" }, `rank of “${own}”`), make("th", { scope: "col" }, "its p"),
    ...Array.from({ length: ids.shape[2] }, (_, i) => make("th", { scope: "col" }, i === 0 ? "likeliest" : `${i + 1}.`)));
  const rows = [];
  for (let row = 0; row < ids.shape[1]; row += 1) {
    const last = row === ids.shape[1] - 1;
    const cells = Array.from(at(ids, token, row), (id, i) => {
      const name = item.vocabulary[id], share = (at(shares, token, row, i) / 255) ** 2;
      const cell = make("td", { class: name === own ? "own" : "" }, name === own ? "◆ " : "", name,
        make("span", { class: "share" }, ` ${percent(Math.max(share, 1e-9))}`));
      cell.style.setProperty("--share", `${100 * share}%`);
      return cell;
    });
    rows.push(make("tr", { class: row === layer ? "picked" : "", "aria-current": row === layer ? "true" : null },
      make("th", { scope: "row" }, last ? "output" : `layer ${row}`),
      make("td", { class: "number" }, String(at(rank, token, row))),
      make("td", { class: "number" }, percent(at(p, token, row))), ...cells));
  }
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

// One strip per signal: where the picked object (large) and the others of this text (small) lie among all.
function signalRows(item, token, facts) {
  const { names, rows } = item.signals;
  const picked = rows.find((one) => one.token === token);
  const order = Object.keys(facts);
  const sorted = names.map((name, i) => [name, i, order.includes(name) ? order.indexOf(name) : order.length]);
  return sorted.sort((a, b) => a[2] - b[2]).map(([name, i]) => {
    const about = facts[name] || { title: name, meaning: "", sign: 0 };
    const strip = make("div", { class: "strip", role: "img" });
    for (const row of rows) {
      const place = row.percentiles[i];
      if (place === null || place === undefined) continue;
      const dot = make("span", { class: `dot ${row.label}${row === picked ? " picked" : ""}`, title: row.word });
      dot.style.left = `${place}%`;
      strip.append(dot);
    }
    const value = picked.values[i], place = picked.percentiles[i];
    const said = value === null ? "not measured"
      : place === null || place === undefined ? short(value) : `${short(value)}, percentile ${Math.round(place)}`;
    strip.setAttribute("aria-label", `${about.title}: ${said}`);
    const way = about.sign > 0 ? "hallucinated: higher →" : about.sign < 0 ? "hallucinated: lower ←" : "";
    return make("div", { class: "signal" },
      make("div", { class: "name", title: about.meaning }, about.title, way ? make("small", {}, way) : null),
      strip, make("div", { class: "said" }, said));
  });
}

function scoreText(score) {
  if (score.answer !== undefined) {
    const right = score.right === null ? "" : score.right ? ", which is right" : ", which is wrong";
    return `read as ${score.answer ?? "neither yes nor no"}${right}`;
  }
  return `${score.n_mentions} mentions of objects, ${score.n_hallucinated} hallucinated; `
    + `${score.n_true_mentioned} of ${score.n_true_objects} objects in the image named`;
}

// A bar from zero: how much likelier a condition finds the picked token than the reference does.
function changeBar(value, most) {
  const bar = make("div", { class: "change" });
  if (Number.isNaN(value)) return fill(bar, "not recorded"), bar;
  const part = make("span", { class: value < 0 ? "less" : "more" });
  const share = Number.isFinite(value) ? Math.min(1, Math.abs(value) / most) : 1;
  part.style.width = `${50 * share}%`;
  bar.append(make("span", { class: "zero" }), part);
  return bar;
}

function conditionRows(item, token) {
  const { change } = item.arrays;
  const finite = change.values.filter((one) => Number.isFinite(one));
  const most = Math.max(0.1, ...Array.from(finite, Math.abs));
  return item.conditions.map((one, row) => {
    const value = token === null ? NaN : at(change, row, token);
    const said = one.note ? one.note
      : value === -Infinity ? "excluded by this condition"
      : Number.isNaN(value) ? "" : `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(2)} nats`;
    const moves = [
      one.added.length ? `adds ${one.added.join(", ")}` : "", one.dropped.length ? `drops ${one.dropped.join(", ")}` : "",
    ].filter(Boolean).join("; ");
    const role = row === 0 ? "the reference" : one.control_of ? `control of ${one.control_of}` : one.role;
    return make("div", { class: "condition" },
      make("div", {}, make("strong", {}, one.name), make("small", {}, ` ${role}`)),
      make("p", { class: "text" }, ...markedText(one.text, one.mentions)),
      make("p", { class: "moves" }, [row ? moves || (item.task === "captions" ? "names the same objects" : "") : "",
        scoreText(one.score)].filter(Boolean).join(" · ")),
      row === 0 || token === null ? null
        : make("div", { class: "effect" }, one.note ? null : changeBar(value, most), make("span", {}, said)));
  });
}
