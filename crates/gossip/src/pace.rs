//! How often members speak: so that what one node hears does not grow with the federation. Up to
//! twenty members the times are the shortest; beyond, they grow with the number of members.

use std::num::NonZeroU8;
use std::time::Duration;

/// The longest time that passes between signs of life a node expects of a member: two and a half
/// times a second, and 125 ms more for each member beyond twenty.
const SUSPECT_LEAST: Duration = Duration::from_millis(2500);
const SUSPECT_EACH: Duration = Duration::from_millis(125);
/// A node wants twenty reports a second at most.
const REPORT_EACH: Duration = Duration::from_millis(50);
/// A round-trip time is measured anew this often, but three or four pings a second suffice.
const RTT_LEAST: Duration = Duration::from_secs(5);
const RTT_EACH: Duration = Duration::from_millis(300);

const SPACING_LEAST: Duration = Duration::from_millis(250);

fn of(members: usize, each: Duration) -> Duration {
    each.saturating_mul(u32::try_from(members).unwrap_or(u32::MAX))
}

/// Silence after which a node says in its report that it does not hear a member, in a federation
/// of `members`.
pub fn suspect_after(members: usize) -> Duration {
    SUSPECT_LEAST.max(of(members, SUSPECT_EACH))
}

/// Silence after which a node asks a member for a sign of life.
pub(crate) fn ping_after(members: usize) -> Duration {
    suspect_after(members) * 3 / 5
}

/// Time between two measurements of the round-trip time to a member.
pub(crate) fn rtt_interval(members: usize) -> Duration {
    RTT_LEAST.max(of(members, RTT_EACH))
}

/// The shortest time between two reports of a site when nothing changed.
pub fn report_interval(members: usize) -> Duration {
    of(members, REPORT_EACH)
}

/// The shortest time between two reports of a site when something changed: many may have seen the
/// same change.
pub fn report_spacing(members: usize) -> Duration {
    (report_interval(members) / 4).max(SPACING_LEAST)
}

/// Addresses that are dialled at once of one member that is not on the same link. Both transports
/// together find out sooner that a member is back; one after the other, QUIC first, spares
/// handshakes.
pub(crate) const fn addresses_at_once(members: usize) -> NonZeroU8 {
    const BOTH: NonZeroU8 = NonZeroU8::new(8).unwrap();
    if members <= 20 { BOTH } else { NonZeroU8::MIN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_hears_stays_bounded() {
        for members in [1, 5, 20, 100, 1000] {
            let per_second = |interval: Duration| members as f64 / interval.as_secs_f64();
            assert!(per_second(report_interval(members)) <= 20.0 + 1e-9);
            assert!(per_second(ping_after(members)) <= 20.0);
            assert!(per_second(rtt_interval(members)) <= 4.1);
        }
    }

    #[test]
    fn a_ping_and_its_answer_come_before_suspicion() {
        for members in [1, 5, 20, 100, 1000] {
            let left = suspect_after(members) - ping_after(members);
            assert!(left >= Duration::from_secs(1), "{members}: {left:?}");
        }
        assert_eq!(suspect_after(5), Duration::from_millis(2500));
    }
}
