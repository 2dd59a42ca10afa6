// Draws report.html from the data in it. Texts of the model and its tokens are only ever set as text content.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

function problem(text) {
  document.getElementById("problem").textContent = text;
}

// plotly.js is in the page compressed: base64 of gzip.
async function loadPlotly() {
  if (!("DecompressionStream" in window)) {
    throw new Error("the figures need a browser of 2023 or later; the tables are complete without");
  }
  const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function drawFigures() {
  await loadPlotly();
  const config = {
    responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  };
  for (const place of document.querySelectorAll(".figure")) {
    const figure = data.figures[place.dataset.figure];
    await Plotly.newPlot(place, figure.data, figure.layout, config);
  }
}

// --- the text, coloured by divergence

function colour(share) {
  return `rgb(255, ${Math.round(255 - 135 * share)}, ${Math.round(255 - 205 * share)})`;
}

function drawStrip(place, strip) {
  let window = -1;
  strip.tokens.forEach((token, index) => {
    if (token.window !== window) {
      window = token.window;
      const title = document.createElement("span");
      title.className = "window";
      title.textContent = `window ${window}`;
      place.append(title);
      const given = document.createElement("span");
      given.className = "given";
      given.textContent = data.texts[strip.given[window]];
      place.append(given);
    }
    const span = document.createElement("span");
    span.textContent = data.texts[token.id];
    span.dataset.index = index;
    if (token.kl === null) span.className = "lost";
    else span.style.background = colour(Math.min(Math.sqrt(token.kl / strip.most), 1));
    if (token.differs) span.classList.add("differs");
    if (index === strip.first) span.classList.add("first");
    place.append(span);
  });
  place.addEventListener("mouseover", (event) => {
    const index = event.target.dataset.index;
    if (index !== undefined) showHover(event, strip.tokens[index]);
  });
  place.addEventListener("mouseleave", () => { hover.style.display = "none"; });
}

const hover = document.getElementById("hover");

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function showHover(event, token) {
  hover.replaceChildren(element("div", `${data.words[token.id]}  window ${token.window}, position ${token.place}`));
  const what = token.kl === null ? "the plan's logits are not finite" : `KL(base || plan) ${token.kl.toPrecision(3)} nats`;
  hover.append(element("div", what));
  const table = document.createElement("table");
  const header = document.createElement("tr");
  header.append(element("th", "base"), element("th", ""), element("th", "plan"), element("th", ""));
  table.append(header);
  token.base.forEach(([id, probability], rank) => {
    const row = document.createElement("tr");
    const cells = [data.words[id], percent(probability)];
    const [other, own] = token.plan[rank] ?? [null, null];
    cells.push(other === null ? "" : data.words[other], own === null ? "" : percent(own));
    row.append(...cells.map((cell) => element("td", cell)));
    table.append(row);
  });
  const own = document.createElement("tr");
  own.append(element("th", "the token itself"), element("td", percent(token.own[0])), element("th", ""),
    element("td", token.own[1] === null ? "" : percent(token.own[1])));
  table.append(own);
  hover.append(table);
  hover.style.display = "block";
  const box = hover.getBoundingClientRect();
  hover.style.left = `${Math.max(Math.min(event.clientX + 14, window.innerWidth - box.width - 8), 8)}px`;
  const below = event.clientY + 18;
  hover.style.top = `${below + box.height < window.innerHeight ? below : Math.max(event.clientY - box.height - 12, 8)}px`;
}

function percent(probability) {
  return `${(100 * probability).toFixed(1)} %`;
}

document.querySelectorAll(".strip").forEach((place) => drawStrip(place, data.strips[place.dataset.strip]));
drawFigures().then(
  () => { document.body.dataset.drawn = "yes"; },
  (error) => { problem(`The figures could not be drawn: ${error.message}`); document.body.dataset.drawn = "no"; },
);
