// A module as its author would write it: see "A page of your own" in the README.
export default async function (root, edge) {
  const line = (text) => { const p = document.createElement("p"); p.textContent = text; root.append(p); };
  const sid = await edge.session();
  line(`I am ${edge.info.plugin} on ${edge.info.edge}`);
  const hello = await edge.fetch(`hello/${sid}`);
  line(`${hello.status} ${hello.json().hello === sid ? "my session" : "not mine"}`);
  const taken = await edge.fetch("report", {method: "POST", body: JSON.stringify({from: "friendly"})});
  line(`taken ${taken.json().taken} as ${taken.json().type}`);
  edge.onNotification(({topic, data}) => line(`heard ${topic}: ${data.word}`));
  const button = document.createElement("button");
  button.textContent = "Say it";
  button.onclick = () => edge.flash("from the frame", "good");
  root.append(button);
  line("ready");
}
