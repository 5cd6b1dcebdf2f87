// Uses a report's page as a user does, behind its own script, and leaves what it found in the page.
addEventListener("error", (event) => { document.title = `error: ${event.message}`; });
(async () => {
  const found = [];
  const check = (what, holds) => found.push(`${holds ? "ok" : "WRONG"} ${what}`);
  const wait = () => new Promise((done) => setTimeout(done, 50));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const names = () => all("tbody tr td:first-child").map((cell) => cell.textContent);
  const bytes = (text) => {
    const [number, unit] = text.split(" ");
    return Number(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].indexOf(unit);
  };
  const column = (index) => all(`tbody tr td:nth-child(${index})`).map((cell) => bytes(cell.textContent));
  const sorted = (numbers) => numbers.every((number, index) => !index || number <= numbers[index - 1]);
  const total = () => document.querySelector("tfoot").textContent;
  await wait();
  const whole = total(), start = document.getElementById("path").textContent;
  check("sizes fall from row to row", sorted(column(2)) && names().length > 1);
  all("thead button")[1].click();
  check("a second click turns the order", sorted(column(2).reverse()));
  check("the order is announced", all("th")[1].getAttribute("aria-sort") === "ascending");
  all("thead button")[0].click();
  check("names in order", names().join() === names().sort((a, b) => a.localeCompare(b, "en", {numeric: true})).join());
  for (const kind of ["module", "type", "operation", "line", "alike"]) {
    const rows = document.getElementById("rows");
    rows.value = kind;
    rows.dispatchEvent(new Event("input", {bubbles: true}));
    check(`the same sum by ${kind}`, total().match(/[KMGT]?i?B.*%/)[0] === whole.match(/[KMGT]?i?B.*%/)[0]);
  }
  const filter = document.getElementById("filter");
  filter.value = "no such module";
  filter.dispatchEvent(new Event("input", {bubbles: true}));
  check("a filter leaves what fits it", names().length === 0);
  filter.value = "";
  filter.dispatchEvent(new Event("input", {bubbles: true}));
  const scale = document.getElementById("scale"), maps = all(".map");
  if (maps.length > 1) {
    const edges = () => all(".map").map((map) => Math.max(...[...map.children].map((tile) => parseFloat(tile.style.width) + parseFloat(tile.style.left))));
    const [full, part] = edges();
    scale.click();
    await wait();
    check("at one scale what keeps less is smaller, and fills its frame without", part < full && Math.abs(edges()[1] - edges()[0]) < 1);
    scale.click();
    await wait();
  }
  document.querySelector("button.part").click();
  await wait();
  check("a click zooms in", document.getElementById("path").textContent !== start && location.hash.length > 1);
  check("the focus is where one is", document.activeElement.getAttribute("aria-current") === "location");
  while (location.hash.length > 1) {
    const before = location.hash;
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
    await wait();
    if (location.hash === before) break;
  }
  check("Escape goes up to the model", document.getElementById("path").textContent === start);
  for (const figure of all(".drawn[data-bars]")) {
    const read = figure.nextElementSibling, said = [];
    for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) {
      figure.focus();
      figure.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      said.push(read.textContent);
    }
    check("arrow keys read places of a step", document.activeElement === figure && said[0] && said[0] === said[2]);
  }
  check("nothing wider than the window", document.documentElement.scrollWidth <= innerWidth);
  document.title = "done";
  document.body.append(Object.assign(document.createElement("pre"), {id: "found", textContent: found.join("\n")}));
})();
