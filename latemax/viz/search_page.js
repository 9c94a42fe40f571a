"use strict";
// Shows one part of the query on all results: -1 is nothing, 0 the whole query, from 1 on its words.
(() => {
  const HOT = [213, 94, 0];
  const data = JSON.parse(document.getElementById("data").textContent);
  const words = document.querySelector(".words");
  const chips = [...words.querySelectorAll(".chip")];
  const cards = [...document.querySelectorAll(".result")];
  const rows = cards.map((card) => [...card.querySelectorAll("tbody tr")]);
  const status = document.getElementById("status");
  let pressed = 0;

  const percent = (x) => `${100 * x}%`;
  const alpha = (level) => 0.82 * (level / 255) ** 2;

  /** [left, top, right, bottom] of a token as fractions of the picture, or undefined. */
  function placeOf(result, token) {
    if (result.regions) return result.regions[token] || undefined;
    if (!result.grid) return undefined;
    const [n, m] = result.grid;
    const [left, top, right, bottom] = result.crop;
    const row = Math.floor(token / m), column = token % m;
    const width = (right - left) / m, height = (bottom - top) / n;
    return [left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height];
  }

  function nameOf(result, token) {
    if (result.grid) return `row ${Math.floor(token / result.grid[1]) + 1}, column ${token % result.grid[1] + 1}`;
    const place = placeOf(result, token);
    if (!place) return `token ${token + 1}, which has no place`;
    const [x, y] = [(place[0] + place[2]) / 2, (place[1] + place[3]) / 2].map((at) => Math.round(100 * at));
    return `${x}\u00a0% from the left, ${y}\u00a0% from the top`;
  }

  function spot(element, [left, top, right, bottom]) {
    Object.assign(element.style, {
      left: percent(left), top: percent(top), width: percent(right - left), height: percent(bottom - top),
    });
  }

  function drawHeat(canvas, result, key) {
    const levels = key < 0 || !result.heat.length ? "" : atob(result.heat[key]);
    if (!levels) {
      canvas.width = canvas.height = 0;
    } else if (result.grid) {
      [canvas.height, canvas.width] = result.grid;
      spot(canvas, result.crop);
      const context = canvas.getContext("2d");
      const image = context.createImageData(canvas.width, canvas.height);
      for (let i = 0; i < levels.length; i++) image.data.set([...HOT, 255 * alpha(levels.charCodeAt(i))], 4 * i);
      context.putImageData(image, 0, 0);
    } else {
      canvas.width = canvas.height = 512;
      spot(canvas, [0, 0, 1, 1]);
      const context = canvas.getContext("2d");
      // where regions overlap, the strongest is seen
      const order = [...levels].map((c, i) => [c.charCodeAt(0), i]).sort((a, b) => a[0] - b[0]);
      for (const [level, i] of order) {
        if (!result.regions[i]) continue;
        const [left, top, right, bottom] = result.regions[i].map((x) => 512 * x);
        context.clearRect(left, top, right - left, bottom - top);
        context.fillStyle = `rgba(${HOT.join()}, ${alpha(level)})`;
        context.fillRect(left, top, right - left, bottom - top);
      }
    }
  }

  function describe(result, key) {
    const hits = result.hits[key];
    const part = key ? `${data.labels[key]}: ${result.parts[key]} of the score` : data.labels[0];
    if (!hits.length) return `${part}, no patch`;
    if (hits.length === 1) return `${part}, best patch: ${nameOf(result, hits[0])}`;
    const bare = hits.filter((hit) => !placeOf(result, hit)).length;
    if (!key && bare) {
      const placed = hits.length - bare;
      const patches = placed ? `${placed} best patch${placed > 1 ? "es" : ""} and ` : "";
      return `${part}, ${patches}${bare} best token${bare > 1 ? "s" : ""} without a place`;
    }
    const some = key ? `: ${hits.slice(0, 3).map((hit) => nameOf(result, hit)).join("; ")}` : "";
    return `${part}, ${hits.length} best patches${some}${key && hits.length > 3 ? "; …" : ""}`;
  }

  function show(key) {
    chips.forEach((chip, i) => chip.classList.toggle("shown", i === key));
    cards.forEach((card, at) => {
      const result = data.results[at];
      card.classList.toggle("active", key >= 0 && result.heat.length > 0);
      drawHeat(card.querySelector("canvas"), result, key);
      const hits = key < 0 ? [] : result.hits[key].map((token) => placeOf(result, token)).filter(Boolean);
      card.querySelector(".hits").replaceChildren(...hits.map((place) => {
        const hit = document.createElement("span");
        hit.className = "hit";
        spot(hit, place);
        return hit;
      }));
      card.querySelector(".where").textContent = key < 0 ? "" : describe(result, key);
      rows[at].forEach((row, i) => row.classList.toggle("shown", i + 1 === key));
    });
    document.getElementById("scale").textContent = key < 0 ? "" : data.scales[key].join(" … ");
  }

  /** For screen readers: what the shown part is on the first result. */
  function say(key) {
    if (key < 0) status.textContent = "no word is shown";
    else if (data.results.length) status.textContent = `Result 1: ${describe(data.results[0], key)}`;
  }

  chips.forEach((chip, key) => {
    chip.addEventListener("mouseenter", () => show(key));
    chip.addEventListener("mouseleave", () => show(pressed));
    chip.addEventListener("focus", () => { show(key); say(key); });
    chip.addEventListener("blur", () => show(pressed));
    chip.addEventListener("click", () => press(pressed === key ? -1 : key));
  });
  rows.forEach((inside) => inside.forEach((row, i) => {
    row.addEventListener("mouseenter", () => show(i + 1));
    row.addEventListener("mouseleave", () => show(pressed));
  }));

  function press(key) {
    pressed = key;
    chips.forEach((chip, i) => chip.setAttribute("aria-pressed", String(i === key)));
    show(key);
    say(key);
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") press(0);
  });
  show(pressed);
})();
