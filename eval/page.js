"use strict";
// the tools of a report: sort, filter and hide columns of its tables, compare images of two rows. The page is whole without them.
document.documentElement.classList.add("script");
const all = (query, from = document) => [...from.querySelectorAll(query)];
all(".tools").forEach(tools => { tools.hidden = false; });

for (const box of all(".cells")) {
  const body = box.querySelector("tbody");
  all("thead th", box).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      all("thead th", box).forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column]?.dataset.v ?? "";
      const order = (one, two) => {
        const [a, b] = [value(one), value(two)];
        if (a === "" || b === "") return (a === "") - (b === ""); // empty cells stay last
        return (down ? -1 : 1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
      };
      body.append(...all("tr", body).sort(order));
    });
  });
}
const filter = document.getElementById("filter"), more = document.getElementById("more");
filter?.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/);
  for (const row of all(".cells tbody tr")) {
    const text = all("th, .words", row).map(cell => cell.textContent.toLowerCase()).join(" ");
    row.hidden = !words.every(word => text.includes(word));
  }
});
more?.addEventListener("click", () => {
  const on = document.querySelector(".cells").classList.toggle("all");
  more.setAttribute("aria-pressed", on);
});

const viewer = document.getElementById("viewer");
if (viewer) {
  const [left, right] = all("select", viewer), [under, over] = all("img", viewer), slider = viewer.querySelector("input");
  const draw = () => {
    for (const [choice, image] of [[right, under], [left, over]]) {
      const source = document.getElementById(choice.value);
      image.src = source.src;
      image.alt = choice.selectedOptions[0].textContent;
      image.className = source.className;
    }
    over.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`;
  };
  [left, right, slider].forEach(one => one.addEventListener("input", draw));
  const pick = row => {
    all("tr.picked").forEach(other => other.classList.remove("picked"));
    row.classList.add("picked");
    right.value = row.dataset.strip;
    draw();
    viewer.scrollIntoView({ block: "nearest" });
  };
  for (const row of all("tr[data-strip]")) {
    row.tabIndex = 0;
    row.setAttribute("aria-label", `show the images of ${row.cells[0].textContent}`);
    row.addEventListener("click", () => pick(row));
    row.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        pick(row);
      }
    });
  }
  draw();
}
for (const button of all("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(text);
    try { await navigator.clipboard.writeText(text.textContent); } catch { document.execCommand("copy"); }
    button.textContent = "copied";
  });
}
