//! When a silent member counts as lost: a pure decision over what this node hears and what others
//! say they hear.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use krake_model::ids::NodeId;

use crate::pace::suspect_after;

/// What this node hears itself, and what it was told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Opinions {
    /// Who decides.
    pub own: Option<NodeId>,
    /// All members.
    pub members: BTreeSet<NodeId>,
    /// How long each other member has been silent towards this node.
    pub silence: BTreeMap<NodeId, Duration>,
    /// Whom each other member says it does not hear.
    pub reported: BTreeMap<NodeId, BTreeSet<NodeId>>,
}

impl Opinions {
    /// How long `node` has been silent; for ever when it was never heard.
    fn silence_of(&self, node: &NodeId) -> Duration {
        if self.own == Some(*node) {
            return Duration::ZERO;
        }
        self.silence.get(node).copied().unwrap_or(Duration::MAX)
    }

    /// Silence that makes a member suspect.
    fn suspect_after(&self) -> Duration {
        suspect_after(self.members.len())
    }

    /// Members that were heard lately, whoever has these opinions among them.
    fn heard(&self) -> impl Iterator<Item = &NodeId> {
        let limit = self.suspect_after();
        let heard = move |node: &&NodeId| self.silence_of(node) < limit;
        self.members.iter().filter(heard)
    }

    /// Whether no majority of the members is heard: then it may be this node that is cut off.
    pub fn is_isolated(&self) -> bool {
        self.heard().count() * 2 <= self.members.len()
    }
}

/// Of a federation of `members` those that were silent for so long that it belongs into the report.
pub(crate) fn unheard(
    mut silence: BTreeMap<NodeId, Duration>,
    members: usize,
) -> BTreeMap<NodeId, Duration> {
    let limit = suspect_after(members);
    silence.retain(|_, silence| *silence >= limit);
    silence
}

/// What is thought of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Heard lately.
    Alive,
    /// Silent, but not long enough, or others still hear it.
    Suspect,
    /// Silent for long, and most of the members we hear say the same.
    Lost,
    /// This node hears no majority: it may be the one that is cut off, so it judges nobody.
    Isolated,
}

/// Judges `subject` with `detect_after` as the silence that counts.
pub fn verdict(opinions: &Opinions, subject: NodeId, detect_after: Duration) -> Verdict {
    let own_silence = opinions.silence_of(&subject);
    if own_silence < opinions.suspect_after().min(detect_after) {
        return Verdict::Alive;
    }
    if opinions.is_isolated() {
        return Verdict::Isolated;
    }
    let heard: Vec<&NodeId> = opinions.heard().collect();
    let agreeing = heard
        .iter()
        .filter(|node| {
            opinions.own == Some(***node)
                || opinions
                    .reported
                    .get(**node)
                    .is_some_and(|list| list.contains(&subject))
        })
        .count();
    if own_silence >= detect_after && agreeing * 2 > heard.len() {
        Verdict::Lost
    } else {
        Verdict::Suspect
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DETECT: Duration = Duration::from_secs(5);

    fn node(number: u8) -> NodeId {
        NodeId::from_bytes([number; 32])
    }

    fn opinions(silent: &[u8], seconds: u64, agreeing: &[u8]) -> Opinions {
        Opinions {
            own: Some(node(1)),
            members: (1..=5).map(node).collect(),
            silence: (2..=5)
                .map(|n| {
                    let silence = if silent.contains(&n) { seconds } else { 0 };
                    (node(n), Duration::from_secs(silence))
                })
                .collect(),
            reported: agreeing
                .iter()
                .map(|n| (node(*n), silent.iter().map(|s| node(*s)).collect()))
                .collect(),
        }
    }

    #[test]
    fn lost_needs_time_and_a_majority() {
        assert_eq!(
            verdict(&opinions(&[], 0, &[]), node(5), DETECT),
            Verdict::Alive
        );
        let early = opinions(&[5], 3, &[2, 3, 4]);
        assert_eq!(verdict(&early, node(5), DETECT), Verdict::Suspect);
        let alone = opinions(&[5], 60, &[]);
        assert_eq!(verdict(&alone, node(5), DETECT), Verdict::Suspect);
        let agreed = opinions(&[5], 6, &[2, 3]);
        assert_eq!(verdict(&agreed, node(5), DETECT), Verdict::Lost);
    }

    #[test]
    fn who_hears_no_majority_judges_nobody() {
        let isolated = opinions(&[3, 4, 5], 60, &[2]);
        assert_eq!(verdict(&isolated, node(5), DETECT), Verdict::Isolated);
    }

    #[test]
    fn a_member_never_heard_of_is_not_alive() {
        let mut unknown = opinions(&[], 0, &[2, 3, 4]);
        unknown.silence.remove(&node(5));
        assert_ne!(verdict(&unknown, node(5), DETECT), Verdict::Alive);
    }
}
