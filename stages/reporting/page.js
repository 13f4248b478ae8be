"use strict";

// Charts: colours are the style sheet's variables, so that a change between light and dark needs no new drawing.
const specs = JSON.parse(document.getElementById("charts").textContent);
for (const [name, spec] of Object.entries(specs)) {
  const place = document.getElementById("chart-" + name);
  place.textContent = "";
  // `ast`: expressions are read, not compiled, which the page's own policy forbids.
  vegaEmbed(place, spec, { actions: false, ast: true, defaultStyle: false, renderer: "svg", tooltip: false });
}

// Answers: hide those without the words, and order the rest.
const list = document.getElementById("answer-list");
if (list) {
  const answers = [...list.children];
  const words = document.getElementById("filter"), order = document.getElementById("order");
  const plain = (text) => text.normalize("NFC").toLowerCase();
  const said = new Map(
    answers.map((answer) => [answer, plain([...answer.querySelectorAll(".text")].map((part) => part.textContent).join("\n"))]),
  );
  const compare = {
    original: () => 0,
    "chrf-most": (one, other) => other.dataset.chrf - one.dataset.chrf,
    "chrf-least": (one, other) => one.dataset.chrf - other.dataset.chrf,
    "loss-most": (one, other) => other.dataset.loss - one.dataset.loss,
    "loss-least": (one, other) => one.dataset.loss - other.dataset.loss,
  };
  const show = () => {
    const wanted = plain(words.value.trim());
    for (const answer of answers) answer.classList.toggle("filtered", !said.get(answer).includes(wanted));
    const shown = answers.filter((answer) => !answer.classList.contains("filtered")).length;
    document.getElementById("shown").textContent = shown + " of " + answers.length + " answers";
  };
  const sort = () => list.append(...[...answers].sort(compare[order.value]));
  words.addEventListener("input", show);
  order.addEventListener("change", sort);
  document.getElementById("controls").hidden = false;
  show();
  sort();
}
