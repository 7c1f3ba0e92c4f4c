//! How a member leaves: what still keeps it, letting it go, and learning of it.
//!
//! A site whose object is deleted is leaving: its applications move to other sites, and its node gives
//! its votes and what it leads away. The leader of the meta group looks what is left, and lets it go
//! when that is nothing: one command takes it from the members and notes that it left. Until then it is
//! a member like the others, for what depends on it must be able to speak with it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use krake_consensus::{Command, Expect, Operation};
use krake_gossip::Network;
use krake_model::{AppKey, GroupId, Member, NodeId};
use serde_json::Value;
use tracing::{debug, info};

use super::put;
use crate::catalog::{Catalog, PATIENCE};
use crate::federation::{Federation, now};
use crate::kinds::{FORCED, MEMBER_FINALIZER};
use crate::owner::plan::{Sight, World as _};
use crate::records::{self, AssignRecord, Departure, Tombstone};
use crate::rpc::{self, JoinReply, Knock};

/// How often it is looked what keeps those that are leaving.
const INTERVAL: Duration = Duration::from_secs(1);
/// A look takes at most one part in so many of the time.
const DUTY: u32 = 10;
/// Applications that are named among those that keep a site.
const NAMED_MAX: usize = 3;
/// How long a member has to say whether we are one.
const STANDING_TIME: Duration = Duration::from_secs(3);

/// What there is of a member that is leaving.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rest {
    /// Applications that have a copy there, or had one and wait to hear that it is gone.
    apps: BTreeSet<AppKey>,
    /// Groups it votes in.
    votes: usize,
    /// Others that stay.
    others: usize,
    /// It is not heard of.
    lost: bool,
    /// It goes without waiting for what runs there.
    forced: bool,
    /// Finalizers that somebody else removes.
    held_by: Vec<String>,
}

/// Why it cannot go yet, if so.
fn obstacle(site: &str, rest: &Rest) -> Option<String> {
    if rest.others == 0 {
        return Some(
            "it is the last one of those that stay: stop its node instead, or let another site join"
                .to_owned(),
        );
    }
    if !rest.held_by.is_empty() {
        return Some(format!("it is held by {}", rest.held_by.join(", ")));
    }
    let mut left = Vec::new();
    let apps = rest.apps.len();
    if apps > 0 && !rest.forced {
        let named = rest.apps.iter().take(NAMED_MAX);
        let named: Vec<String> = named.map(ToString::to_string).collect();
        let more = if apps > NAMED_MAX { ", …" } else { "" };
        let noun = if apps == 1 { "copy" } else { "copies" };
        left.push(format!("{apps} {noun} ({}{more})", named.join(", ")));
    }
    match rest.votes {
        0 => {}
        1 => left.push("its vote in 1 group".to_owned()),
        votes => left.push(format!("its votes in {votes} groups")),
    }
    if left.is_empty() {
        return None;
    }
    let hint = if apps == 0 || rest.forced {
        String::new()
    } else if rest.lost {
        format!(
            "; it is not heard of, so nobody knows whether they still run: krakectl delete site {site} --force removes it nevertheless"
        )
    } else {
        "; krakectl why APP tells where they could go".to_owned()
    };
    Some(format!("still there: {}{hint}", left.join(" and ")))
}

/// While this node leads the meta group: lets go whom nothing keeps any more, until the program ends.
pub async fn let_go(federation: Federation) {
    let mut pause = INTERVAL;
    loop {
        tokio::time::sleep(pause).await;
        pause = INTERVAL;
        if !federation.catalog.host.leads(GroupId::META) || federation.leaving().is_empty() {
            continue;
        }
        let begun = Instant::now();
        if let Err(error) = look(&federation).await {
            debug!(%error, "nobody is let go for now");
        }
        pause = INTERVAL.max(begun.elapsed() * DUTY);
    }
}

async fn look(federation: &Federation) -> anyhow::Result<()> {
    let catalog = &federation.catalog;
    let groups = Catalog::all_groups(catalog.shards);
    let fresh = catalog.host.read_barrier(&groups, PATIENCE).await;
    let leaving = federation.leaving();
    let members = catalog.members();
    let stay = members.iter().filter(|m| !leaving.contains(&m.node));
    let others = stay.count();
    for member in members.iter().filter(|m| leaving.contains(&m.node)) {
        let site_key = records::object_key("sites", "", &member.site.name);
        let Some((site, entry)) = catalog.read::<Value>(GroupId::META, &site_key) else {
            continue;
        };
        let waits = match &fresh {
            Err(error) => Some(format!("it is not known what is still there: {error}")),
            Ok(()) => {
                let rest = rest(federation, member, &site, others).await?;
                obstacle(&member.site.name, &rest)
            }
        };
        match waits {
            Some(text) => tell(catalog, member, text).await?,
            None => remove(catalog, member, &site, Expect::Revision(entry.modified)).await?,
        }
    }
    Ok(())
}

async fn rest(
    federation: &Federation,
    member: &Member,
    site: &Value,
    others: usize,
) -> anyhow::Result<Rest> {
    let (catalog, node) = (federation.catalog.clone(), member.node);
    let apps = tokio::task::spawn_blocking(move || apps_at(&catalog, &node)).await?;
    let status = federation.catalog.host.status();
    let votes = status.borrow();
    let votes = votes
        .values()
        .filter(|group| group.voters.contains(&member.replica))
        .count();
    let finalizers = site.pointer("/metadata/finalizers");
    let held_by = finalizers.and_then(Value::as_array).into_iter().flatten();
    let held_by = held_by.filter_map(Value::as_str);
    Ok(Rest {
        apps,
        votes,
        others,
        lost: federation.moment().sight(&node, federation.lost_after) == Sight::Lost,
        forced: site["metadata"]["annotations"][FORCED] == "true",
        held_by: held_by
            .filter(|name| *name != MEMBER_FINALIZER)
            .map(ToOwned::to_owned)
            .collect(),
    })
}

fn apps_at(catalog: &Catalog, node: &NodeId) -> BTreeSet<AppKey> {
    let mut apps = BTreeSet::new();
    for group in catalog.shard_groups() {
        for (_, assign, _) in catalog.read_all::<AssignRecord>(group, records::ASSIGN) {
            let copies = assign.copies.iter().map(|copy| &copy.target);
            if copies.chain(&assign.pending).any(|at| at.node == *node) {
                apps.insert(assign.app);
            }
        }
        for (_, tomb, _) in catalog.read_all::<Tombstone>(group, records::TOMBS) {
            if tomb.targets.iter().any(|target| target.node == *node) {
                apps.insert(tomb.app);
            }
        }
    }
    apps
}

/// Notes what keeps it, for whoever looks at the site.
async fn tell(catalog: &Catalog, member: &Member, text: String) -> anyhow::Result<()> {
    let key = records::leaving_key(&member.node);
    let known = catalog.read::<String>(GroupId::META, &key);
    if known.as_ref().is_some_and(|(known, _)| *known == text) {
        return Ok(());
    }
    info!(
        site = member.site.name,
        reason = text,
        "a site that leaves is kept"
    );
    let operation = put(key, records::write(&text), Expect::Any);
    let command = Command::new(vec![operation]);
    catalog
        .host
        .propose(GroupId::META, command, PATIENCE)
        .await?;
    Ok(())
}

async fn remove(
    catalog: &Catalog,
    member: &Member,
    site: &Value,
    unchanged: Expect,
) -> anyhow::Result<()> {
    let name = &member.site.name;
    let departure = Departure {
        site: name.clone(),
        left_at: now(),
        forced: site["metadata"]["annotations"][FORCED] == "true",
    };
    let delete = |key: String, expect| Operation::Delete { key, expect };
    let operations = vec![
        delete(records::object_key("sites", "", name), unchanged),
        delete(records::object_key("nodes", "", name), Expect::Any),
        delete(records::member_key(&member.node), Expect::Any),
        delete(records::leaving_key(&member.node), Expect::Any),
        put(
            records::departed_key(&member.node),
            records::write(&departure),
            Expect::Any,
        ),
    ];
    let command = Command::new(operations);
    catalog
        .host
        .propose(GroupId::META, command, PATIENCE)
        .await?;
    info!(site = name, node = %member.node, forced = departure.forced, "a site left the federation");
    Ok(())
}

/// Asks a member whether this node left: those that are no members are told nothing else.
pub async fn ask_standing(network: &Network, member: &Member) -> Option<Departure> {
    let question = rpc::encode(&Knock::Standing).ok()?;
    let answer = network
        .join(member.node, &member.addresses, &question, STANDING_TIME)
        .await;
    match answer.map(|bytes| rpc::decode::<JoinReply>(&bytes)) {
        Ok(Ok(JoinReply::Left(departure))) => return Some(departure),
        Ok(Ok(_)) => {}
        Ok(Err(error)) => debug!(node = %member.node, %error, "an answer that is not one"),
        Err(error) => debug!(node = %member.node, %error, "not asked whether we are a member"),
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rest(apps: &[&str], votes: usize) -> Rest {
        Rest {
            apps: apps
                .iter()
                .map(|name| AppKey::new("default", *name))
                .collect(),
            votes,
            others: 2,
            ..Rest::default()
        }
    }

    #[test]
    fn who_leaves_is_kept_by_copies_and_votes_and_the_reason_says_what_to_do() {
        assert_eq!(obstacle("oslo", &rest(&[], 0)), None);
        let text = obstacle("oslo", &rest(&["shop"], 4)).unwrap();
        assert!(
            text.contains("1 copy (default/shop) and its votes in 4 groups"),
            "{text}"
        );
        assert!(text.contains("krakectl why"), "{text}");
        let text = obstacle("oslo", &rest(&["a", "b", "c", "d"], 1)).unwrap();
        assert!(
            text.contains("4 copies (default/a, default/b, default/c, …)"),
            "{text}"
        );
        let lost = Rest {
            lost: true,
            ..rest(&["shop"], 0)
        };
        let text = obstacle("oslo", &lost).unwrap();
        assert!(text.contains("krakectl delete site oslo --force"), "{text}");
    }

    #[test]
    fn force_does_not_wait_for_copies_but_for_votes_and_the_last_one_stays() {
        let forced = |apps: &[&str], votes| Rest {
            forced: true,
            ..rest(apps, votes)
        };
        assert_eq!(obstacle("oslo", &forced(&["shop"], 0)), None);
        let text = obstacle("oslo", &forced(&["shop"], 1)).unwrap();
        assert_eq!(text, "still there: its vote in 1 group");
        let last = Rest {
            others: 0,
            ..forced(&[], 0)
        };
        assert!(obstacle("oslo", &last).unwrap().contains("last one"));
        let held = Rest {
            held_by: vec!["example.org/audit".to_owned()],
            ..forced(&[], 0)
        };
        assert!(
            obstacle("oslo", &held)
                .unwrap()
                .contains("example.org/audit")
        );
    }
}
