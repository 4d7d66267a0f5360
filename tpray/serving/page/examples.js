// Examples that suit a model, by the kind of input and by what its labels are called.

const FIRM = "The company HuggingFace is based in New York City";

const PAIRS = {
  paraphrase: [
    ["A paraphrase", [FIRM, "HuggingFace's headquarters are situated in Manhattan"]],
    ["None", [FIRM, "Apples are especially bad for your health"]],
  ],
  inference: [
    ["Follows", ["A man is playing a guitar on stage", "A man is making music"]],
    ["Contradicts", ["A man is playing a guitar on stage", "Nobody is on the stage"]],
    ["Leaves open", ["A man is playing a guitar on stage", "The man has played for years"]],
  ],
};

const TEXTS = {
  opinion: [
    ["Pleased", "The staff were kind and the room was spotless. We will come again."],
    ["Displeased", "It broke on the second day, and nobody answered my letters."],
    ["Neither", "The parcel came on Tuesday."],
  ],
  plain: [
    ["A sentence", "The train to Berlin leaves at nine."],
    ["A question", "How do I get my money back?"],
    ["A complaint", "I have waited for a week and nobody has called."],
  ],
};

const RANKINGS = [
  ["Where is the firm?", {
    query: "Where is the firm based?",
    documents: ["Apples are bad for your health", "The company has its headquarters in Paris", "The firm was founded in 2016"],
  }],
  ["How do I pay?", {
    query: "How can I pay for my order?",
    documents: ["We take cards and bank transfers", "Parcels come within three days", "Your invoice is in your account"],
  }],
];

const TALKS = [
  ["A helpful answer", [
    { role: "user", content: "How do I boil an egg?" },
    { role: "assistant", content: "Put it in boiling water for seven minutes, then cool it under the tap." },
  ]],
  ["A rude one", [
    { role: "user", content: "How do I boil an egg?" },
    { role: "assistant", content: "If you cannot even do that, stay out of the kitchen." },
  ]],
];

const ENTITIES = [
  ["A person", "Sarah Connor lives in London and works for the Red Cross."],
  ["An order", "Please send it to Tom Miller, 12 Station Road, Leeds, or call 0113 496 0000."],
];

/** `[[name, value], ...]` for a kind of input. */
export function examples(kind, labels) {
  const named = (pattern) => labels.some((label) => pattern.test(label));
  switch (kind) {
    case "pair":
      return named(/entail|contradict/i) ? PAIRS.inference : PAIRS.paraphrase;
    case "query":
      return RANKINGS;
    case "conversation":
      return TALKS;
    case "tokens":
      return ENTITIES;
    default:
      return named(/positive|negative|star|joy|anger/i) ? TEXTS.opinion : TEXTS.plain;
  }
}

/** The kind of input that a model was most likely made for. */
export function likeliest(info) {
  const takes = (kind) => info.inputs.includes(kind);
  if (takes("conversation") && info.labels.length === 1) return "conversation";
  if (takes("query") && info.labels.length === 1 && info.problem_type !== "regression") return "query";
  if (takes("pair") && info.labels.some((label) => /paraphrase|duplicate|equivalen|entail|contradict/i.test(label))) return "pair";
  return info.inputs[0];
}
