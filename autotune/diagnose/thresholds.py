"""Where a number becomes a finding, each with its reason; diagnosis has no other constants."""

from __future__ import annotations

# A part of a metric's time below this changes the metric by less than its own noise: with some
# hundred requests a mean latency is known to about 5%, and so is a throughput.
MIN_SHARE = 0.05

# Weights of a share in the severity. Time that no request needed to spend counts in full; work
# that the requests asked for counts half, because a server without any fault spends all of its
# time on it, so that a fault of half its size is the first thing to look at.
LOSS = 1.0
WORK = 0.5
# What only says where the work comes from (long prompts) stands behind the work itself.
TRAIT = 0.4
# Seats that stay empty because nobody comes are no fault; they are named so that nobody tunes an
# idle server for throughput.
IDLE = 0.3

# A limit that is met by far leaves no hurry, but the order of its findings stays of interest.
MIN_URGENCY = 0.25

# From here on arrivals come in clumps: both figures are 1 for Poisson arrivals, and a window of
# some twenty requests finds them above 1.5 by chance in one case of twenty.
BURSTY_CV = 1.5
BURSTY_DISPERSION = 2.0

# Offered over sustainable rate. Waiting grows as 1/(1 - utilisation) (Pollaczek-Khinchine), so
# beyond 0.9 it is ten times that of a half idle server, and any clump tips it over.
SATURATED = 0.9

# Decodes of a step at which a device is no longer limited by reading the weights, as a part of the
# rows at which arithmetic takes over (ridge): below half of it, twice as many sequences cost less
# than twice the time.
BATCH_HEADROOM = 0.5

# Occupancy of the KV cache at which admissions begin to wait: the queue's head needs room for a
# whole prompt at once.
CACHE_FULL = 0.9

# Difference between the prefix hits that a trace allows and those that were had, in shares of
# prompt tokens: less than this saves less than its noise.
LOST_HITS = 0.1

# Mean input over mean output tokens. Chat is at about 4 (Azure 2023: 1155 and 211), retrieval and
# summaries are beyond 8 (Azure code: 2048 and 28).
LONG_PROMPT_RATIO = 8.0

# Part of all output tokens that the longest tenth of the answers has. Lognormal lengths with the
# spread of chat (sigma 0.86) have 0.34, exponential ones 0.33.
LONG_TAIL = 0.5

# Clocks below this part of their mean limit under a reason that slows them; sampling and idling
# between steps explain smaller differences.
THROTTLED_CLOCK = 0.97
# Samples with a slowing reason; a GPU may touch its power limit for a moment at any load.
THROTTLED_SAMPLES = 0.1

# Part of the collectives' time that is waiting for a slower rank, from which on the ranks and not
# their links are at fault.
IMBALANCED = 0.5

# Median relative error of the fitted cost of a step, beyond which the steps vary for reasons that
# are not in them: on a quiet machine it is some hundredths.
ERRATIC_STEPS = 0.3

# A limit of seats that is called low on any device, where its ridge is not known: half of this.
FEW_SEATS = 16
