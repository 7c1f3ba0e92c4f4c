//! How leaders spread over the nodes, and how this one gives away what it leads.

use std::collections::BTreeMap;

use krake_model::ids::GroupId;
use tracing::debug;

use super::Core;
use crate::inspect::TransferError;

/// Groups handed over for balance in one look at most: each stands still for a moment.
const BALANCED_AT_ONCE: usize = 16;
/// Ticks after which what was submitted before counts half.
pub(super) const FADE_TICKS: u64 = 100;
/// A leader younger than this is not moved for balance.
const SETTLED_TICKS: u64 = 50;

impl Core {
    /// Whether this node should lead nothing that another live voter can lead.
    pub(crate) fn set_reluctant(&mut self, reluctant: bool) {
        self.reluctant = reluctant;
    }

    /// Hands over groups to live voters that lead two groups fewer than this node, and to a far one
    /// that most of a group's writes are submitted at; where this node is reluctant, all that it can.
    pub(super) fn balance(&mut self) {
        let mut leads = self.leads();
        let own = self.settings.replica;
        let mut mine = leads.get(&own).copied().unwrap_or(0);
        let mut handed_over = 0;
        for group in self.groups.values_mut() {
            let settled = self.ticks.saturating_sub(group.leader_since_tick) > SETTLED_TICKS;
            if !group.leads() || !(settled || self.reluctant) {
                continue;
            }
            let home = group.submissions.home();
            let far = |id: u64| self.members.get(&id).is_some_and(|member| member.far);
            let target = group
                .successors()
                .into_iter()
                .filter_map(|id| leads.get(&id).map(|count| (*count, id)))
                .filter(|(count, id)| {
                    let is_home = home == Some(*id) && far(*id);
                    let leaves_home = home == Some(own) && far(*id);
                    let is_less_busy = count + 2 <= mine && !leaves_home;
                    self.reluctant || is_home || is_less_busy
                })
                .min_by_key(|(count, id)| (home != Some(*id), *count, *id));
            let Some((count, id)) = target else { continue };
            debug!(group = %group.id, to = id, reluctant = self.reluctant, "leadership handed over");
            group.transfer(id);
            self.active.insert(group.id);
            leads.insert(id, count + 1);
            mine = mine.saturating_sub(1);
            handed_over += 1;
            if handed_over == BALANCED_AT_ONCE {
                return;
            }
        }
    }

    /// How many groups each live member leads that is not reluctant to lead more.
    fn leads(&self) -> BTreeMap<u64, usize> {
        let willing = |id: u64| {
            let peer = self.peers.get(&id);
            peer.is_none_or(|peer| !peer.reluctant && !peer.silent)
        };
        let members = self.members.values();
        let mut leads: BTreeMap<u64, usize> = members
            .filter(|member| member.alive && willing(member.replica))
            .map(|member| (member.replica, 0))
            .collect();
        for group in self.groups.values() {
            if let Some(count) = group.leader().and_then(|leader| leads.get_mut(&leader)) {
                *count += 1;
            }
        }
        leads
    }

    /// Hands every led group to another voter, which leads few; returns how many are still led.
    pub(crate) fn hand_over(&mut self) -> usize {
        let mut leads = self.leads();
        let mut led = 0;
        for group in self.groups.values_mut() {
            if !group.is_leader() || group.voters().len() < 2 {
                continue;
            }
            led += 1;
            // Whoever is not willing comes last.
            let count = |id: &u64| leads.get(id).copied().unwrap_or(usize::MAX);
            let next = group.successors().into_iter().min_by_key(count);
            if let Some(id) = next {
                group.transfer(id);
                self.active.insert(group.id);
                leads.entry(id).and_modify(|count| *count += 1);
            }
        }
        led
    }

    /// Hands leadership of a group that is led here to the voter `to`. `Ok(true)`: it is begun;
    /// `Ok(false)`: it leads already. `Err(None)`: another one leads, or nobody.
    pub(crate) fn transfer(&mut self, id: GroupId, to: u64) -> Result<bool, Option<TransferError>> {
        let own = self.settings.replica;
        // Its node, not the group: the library asks anew who is active every election timeout.
        let is_silent = self.peers.get(&to).is_some_and(|peer| peer.silent);
        let Some(group) = self.group_mut(id) else {
            return Err(Some(TransferError::UnknownGroup { group: id }));
        };
        group.transfer_to(to, is_silent, own)
    }
}
