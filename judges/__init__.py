"""Who reads answers: guards that filter and reward, judges that evaluate, a grader of maths."""

from judges.judge import NO_ANSWER, UNSAFE, Judge, agreement, answer_is_correct, content_of
from judges.judge import judge_samples
from judges.judge import is_right, judge_style, label_probability, require_guard, require_judge
from judges.judge import precision_and_recall, require_judges, self_check_rule, shares
