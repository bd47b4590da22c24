// A table that is cut at the right says so.
const tables = [...document.querySelectorAll(".scroll")];
const mark = () => tables.forEach((t) => t.classList.toggle("wide", t.scrollLeft + t.clientWidth < t.scrollWidth - 2));
tables.forEach((table) => table.addEventListener("scroll", mark, { passive: true }));
addEventListener("resize", mark);
mark();
// A click on a heading sorts by that column, better values first; a second click turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const first = heading.dataset.first;
      const now = heading.getAttribute("aria-sort");
      const order = now === first ? (first === "descending" ? "ascending" : "descending") : first;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === ""); // missing values stay last
        return sign * (heading.dataset.text ? x.localeCompare(y) : x - y);
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
