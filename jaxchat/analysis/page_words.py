"""What `report.html` says about each of its figures: how to read it, and in which unit it is."""

PLANS = (
    "Perplexity is exp of the mean of nats a token. Intervals hold the true value with 95 % "
    "(bootstrap-t over windows, each of the weight of its tokens); those of changes are paired: both "
    "plans read the same windows. A change whose interval excludes 0 % is more than luck on texts "
    "like this one."
)
NO_PLANS = (
    "The plan's own perplexity is {own}. No plan is compared with it: --compare SPEC adds one, with "
    "intervals and a text coloured by how much the two disagree."
)
DISAGREEMENTS = (
    "The text, each token coloured by the divergence KL(base || plan) of what is predicted in its "
    "place, in nats; underlined where the most probable token is another one, framed where that "
    "happens first. Hovering shows what both think most probable."
)
INFLUENCE = (
    "Block influence: 1 \N{MINUS SIGN} the cosine of each layer's input and output, mean over tokens; no "
    "unit. Near 0, a layer hardly turns its input."
)
SKIP = (
    "How much the perplexity of the text (the plan's own: {own}) changes without a layer's attention, "
    "its MLP, or both. The scale is in proportion up to 1 % and logarithmic beyond; a cross is a plan "
    "whose logits are not finite. Tall bars are layers that the model cannot do without."
)
HALVES = (
    "What each half adds to the residual stream: its norm against that of the stream it is added to "
    "(a ratio, on a logarithmic scale), its cosine with that stream (below 0 it takes away), both "
    "means over tokens; and its direct effect on the logit of the right next token, less the mean "
    "over the vocabulary, with the scale of the final norm held (direct logit attribution; mean over "
    "predicted tokens). Later layers read what a half adds, and what they make of it counts as "
    "theirs."
)
RYS = (
    "Each cell is the plan with its slots i to j \N{MINUS SIGN} 1 run twice (RYS): its perplexity against "
    "the plan's own, {own}. Blue is better, red worse, a star the best, a cross not finite; cells beyond "
    "the scale have its last colour. {tried} of {total} pairs were tried."
)
ANGULAR = (
    "How much a block of layers turns the residual stream at the last token of each window: the angle "
    "between its input and its output over \N{GREEK SMALL LETTER PI}; 0.5 is orthogonal. Bright "
    "blocks change little, and are the first to be left out."
)
LENS = (
    "The most probable next token if the final norm and the head followed right after each slot; the "
    "colour is its probability, bold is right about what follows. At the right the perplexity of the "
    "whole text read there. \N{MIDDLE DOT} is a blank, \N{RETURN SYMBOL} a line break."
)
