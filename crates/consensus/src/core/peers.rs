//! Nodes that this one votes with: groups that sleep trust their pulse.

use std::collections::BTreeSet;

use krake_model::ids::GroupId;
use tracing::debug;

use super::Core;
use crate::group::Group;
use crate::inspect::Counters;
use crate::wire::{FRAME_MESSAGES_MAX, Pulse};

/// A node that votes in a group in which this one votes, too.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) heard_at: u64,
    /// From its [`Pulse`].
    life: Option<u64>,
    pub(super) reluctant: bool,
    pub(super) silent: bool,
}

impl Core {
    /// Finds out which peers have fallen silent. Groups that sleep trust their pulse.
    pub(super) fn watch_peers(&mut self) {
        let (own, now) = (self.settings.replica, self.ticks);
        if std::mem::take(&mut self.peers_stale) {
            let voters = self.groups.values().map(Group::voters);
            let shared: BTreeSet<u64> = voters.filter(|v| v.contains(&own)).flatten().collect();
            self.peers.retain(|id, _| shared.contains(id));
            for id in shared.into_iter().filter(|id| *id != own) {
                self.peers.entry(id).or_insert(Peer {
                    heard_at: now,
                    life: None,
                    reluctant: false,
                    silent: false,
                });
            }
        }
        let limit = self.settings.election_ticks as u64;
        let mut fell_silent = Vec::new();
        for (id, peer) in &mut self.peers {
            let silence = now.saturating_sub(peer.heard_at);
            if !peer.silent && silence >= limit {
                peer.silent = true;
                fell_silent.push((*id, silence as usize));
            }
        }
        for (id, silence) in fell_silent {
            debug!(replica = id, ticks = silence, "a peer is silent");
            for group in self.groups.values_mut() {
                if group.leader() == Some(id) {
                    group.startle(silence);
                } else if group.is_leader() && group.voters().contains(&id) {
                    group.awaken(0);
                }
            }
        }
    }

    /// Whatever a member sends shows that its node is there.
    pub(super) fn hear(&mut self, sender: u64, pulse: Option<Pulse>) {
        let (now, limit) = (self.ticks, self.settings.election_ticks);
        let Some(peer) = self.peers.get_mut(&sender) else {
            if let Some(pulse) = pulse {
                self.help(sender, &pulse.leaderless);
            }
            return;
        };
        peer.heard_at = now;
        let is_back = std::mem::take(&mut peer.silent);
        let Some(pulse) = pulse else {
            if is_back {
                self.calm(sender);
            }
            return;
        };
        let known = peer.life.replace(pulse.life);
        peer.reluctant = pulse.reluctant;
        if known.is_some_and(|known| known != pulse.life) {
            // It was started again: it leads nothing.
            for group in self.groups.values_mut() {
                if group.leader() == Some(sender) {
                    group.awaken(limit);
                }
            }
        } else if is_back {
            self.calm(sender);
        }
        self.help(sender, &pulse.leaderless);
    }

    fn calm(&mut self, sender: u64) {
        for group in self.groups.values_mut() {
            if group.leader() == Some(sender) {
                group.calm();
            }
        }
    }

    /// A member does not know who leads these groups.
    fn help(&mut self, sender: u64, leaderless: &[GroupId]) {
        let limit = self.settings.election_ticks;
        for id in leaderless.iter().take(FRAME_MESSAGES_MAX) {
            let Some(group) = self.groups.get_mut(id) else {
                continue;
            };
            if group.is_leader() && group.others().contains(&sender) {
                group.ping();
                self.active.insert(*id);
                self.asked_for.insert((sender, *id));
            } else if group.leader() == Some(sender) {
                group.awaken(limit);
            }
        }
    }

    pub(super) fn put_to_sleep(&mut self) {
        let (members, peers) = (&self.members, &self.peers);
        let is_away = |id| !members.get(&id).is_some_and(|member| member.alive);
        let is_silent = |id| peers.get(&id).is_none_or(|peer| peer.silent);
        for group in self.groups.values_mut() {
            let Some(told) = group.fall_silent(is_away, is_silent) else {
                continue;
            };
            Counters::add(&self.settings.counters.slept, 1);
            for (id, sleep) in told {
                self.sleeping.entry(id).or_default().push(sleep);
            }
        }
    }

    pub(super) fn pulse(&self) -> Pulse {
        let leaderless = self.groups.values().filter(|group| group.is_leaderless());
        let leaderless = leaderless.map(|group| group.id);
        // Nobody may wait for a leader whose replica was put aside.
        let failed = self.failed.iter().copied();
        Pulse {
            life: self.settings.boot_nonce,
            leaderless: failed.chain(leaderless).take(FRAME_MESSAGES_MAX).collect(),
            reluctant: self.reluctant,
        }
    }
}
