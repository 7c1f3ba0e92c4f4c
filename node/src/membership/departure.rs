//! How a member leaves: what still keeps it, letting it go, and learning of it.
//!
//! A site whose object is deleted is leaving: its applications move to other sites, and its node leads
//! nothing that another one can lead. When nothing of them is left, it gives its votes away, and when it
//! has none, the leader of the meta group, which looks what is left, lets it go: one command takes it
//! from the members and notes that it left. Until then it is a member like the others, for what depends
//! on it must be able to speak with it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use krake_consensus::{Command, Entry, Expect, Operation};
use krake_gossip::Network;
use krake_model::{AppKey, GroupId, Member, NodeId};
use serde_json::Value;
use tracing::{debug, info, warn};

use super::put;
use crate::catalog::{Catalog, PATIENCE};
use crate::federation::{Federation, now};
use crate::kinds::{FORCED, MEMBER_FINALIZER};
use crate::owner::plan::{Sight, World as _};
use crate::records::{self, AssignRecord, Departure, Leaving, Tombstone};
use crate::rpc::{self, JoinReply, Knock, Reply, Request};

/// How often it is looked what keeps those that are leaving.
const INTERVAL: Duration = Duration::from_secs(1);
/// A look takes at most one part in so many of the time.
const DUTY: u32 = 10;
/// Applications that are named among those that keep a site.
const NAMED_MAX: usize = 3;
/// Members that have to say that this node left, where there are as many.
const WITNESSES: usize = 2;
/// How long a member has to say whether we are one.
const STANDING_TIME: Duration = Duration::from_secs(3);

/// Nobody goes by its own will before it has been leaving for so long: an owner that had not heard of
/// it may just be assigning something to it.
const SETTLE: Duration = PATIENCE;

/// What there is of a member that is leaving.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rest {
    /// Applications that have a copy there, or had one and wait to hear that it is gone.
    apps: BTreeSet<AppKey>,
    /// Groups it votes in.
    votes: usize,
    /// It began to leave not long ago.
    young: bool,
    /// It was noted that its votes go to others,
    gives_votes: bool,
    /// and these do not know it yet: they could give it one again.
    unaware: Vec<String>,
    /// It is not heard of.
    unheard: bool,
    /// It goes without waiting for what runs there.
    forced: bool,
    /// Finalizers that somebody else removes.
    held_by: Vec<String>,
}

/// What is to be done about a member that is leaving.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// It is kept by something, and votes on.
    Wait(String),
    /// Its votes go to others.
    GiveVotes(String),
    /// Nothing keeps it.
    LetGo,
}

fn next(site: &str, rest: &Rest) -> Next {
    if !rest.held_by.is_empty() {
        return Next::Wait(format!("it is held by {}", rest.held_by.join(", ")));
    }
    let apps = rest.apps.len();
    if apps > 0 && !rest.forced {
        let named = rest.apps.iter().take(NAMED_MAX);
        let named: Vec<String> = named.map(ToString::to_string).collect();
        let more = if apps > NAMED_MAX { ", …" } else { "" };
        let noun = if apps == 1 { "copy" } else { "copies" };
        let hint = if rest.unheard {
            format!(
                "it is not heard of, so nobody knows whether they still run: krakectl delete site {site} --force removes it nevertheless"
            )
        } else {
            "krakectl why APP tells where they could go".to_owned()
        };
        return Next::Wait(format!(
            "still there: {apps} {noun} ({}{more}); {hint}",
            named.join(", ")
        ));
    }
    if rest.young && !rest.forced {
        return Next::Wait("waiting for what may be on its way to it".to_owned());
    }
    match rest.votes {
        0 if rest.gives_votes && rest.unaware.is_empty() => Next::LetGo,
        0 if rest.gives_votes => {
            Next::GiveVotes(format!("not known yet at {}", rest.unaware.join(", ")))
        }
        0 => Next::GiveVotes("it is about to go".to_owned()),
        1 => Next::GiveVotes("still there: its vote in 1 group".to_owned()),
        votes => Next::GiveVotes(format!("still there: its votes in {votes} groups")),
    }
}

/// While this node leads the meta group: lets go whom nothing keeps any more, until the program ends.
pub async fn let_go(federation: Federation) {
    let mut pause = INTERVAL;
    let mut since = BTreeMap::new();
    loop {
        tokio::time::sleep(pause).await;
        pause = INTERVAL;
        let mut leaving = federation.leaving();
        if !federation.catalog.host.leads(GroupId::META) {
            leaving.clear();
        }
        let begun = Instant::now();
        since.retain(|node, _| leaving.contains(node));
        for node in &leaving {
            since.entry(*node).or_insert(begun);
        }
        if leaving.is_empty() {
            continue;
        }
        if let Err(error) = look(&federation, &since).await {
            debug!(%error, "nobody is let go for now");
        }
        pause = INTERVAL.max(begun.elapsed() * DUTY);
    }
}

/// A member that is leaving, with its site as it is stored.
struct Leaver {
    member: Member,
    site: Value,
    entry: Entry,
}

impl Leaver {
    fn forced(&self) -> bool {
        self.site["metadata"]["annotations"][FORCED] == "true"
    }
}

async fn look(federation: &Federation, since: &BTreeMap<NodeId, Instant>) -> anyhow::Result<()> {
    let catalog = &federation.catalog;
    let groups = Catalog::all_groups(catalog.shards);
    let mut unaware = BTreeMap::new();
    for node in catalog.giving_votes() {
        unaware.insert(node, unaware_of(federation, &node).await);
    }
    // Behind that: who knew it has given it no vote since.
    let fresh = catalog.host.read_barrier(&groups, PATIENCE).await;
    let leaving = federation.leaving();
    let members = catalog.members();
    let count = members.len();
    let mut leavers = Vec::new();
    for member in members.into_iter().filter(|m| leaving.contains(&m.node)) {
        let key = records::object_key("sites", "", &member.site.name);
        if let Some((site, entry)) = catalog.read::<Value>(GroupId::META, &key) {
            leavers.push(Leaver {
                member,
                site,
                entry,
            });
        }
    }
    if leavers.len() == count {
        // Two at once, or one whose last companion is lost: somebody has to stay.
        return match leavers
            .iter()
            .min_by_key(|leaver| first_to_stay(federation, leaver))
        {
            Some(leaver) => call_off(catalog, leaver).await,
            None => Ok(()),
        };
    }
    let noted = catalog.leave_records();
    for leaver in &leavers {
        let known = noted.get(&leaver.member.node);
        let gives_votes = known.is_some_and(|known| known.gives_votes);
        let next = match &fresh {
            Err(error) => {
                let waits = format!("it is not known what is still there: {error}");
                if gives_votes {
                    Next::GiveVotes(waits)
                } else {
                    Next::Wait(waits)
                }
            }
            Ok(()) => {
                let young = since
                    .get(&leaver.member.node)
                    .is_none_or(|at| at.elapsed() < SETTLE);
                let asked = unaware.remove(&leaver.member.node);
                let rest = Rest {
                    gives_votes: gives_votes && asked.is_some(),
                    unaware: asked.unwrap_or_default(),
                    young: young && !gives_votes,
                    ..rest(federation, leaver).await?
                };
                next(&leaver.member.site.name, &rest)
            }
        };
        match next {
            Next::Wait(waits) => tell(catalog, leaver, waits, false).await?,
            Next::GiveVotes(waits) => tell(catalog, leaver, waits, true).await?,
            Next::LetGo => remove(catalog, leaver).await?,
        }
    }
    Ok(())
}

/// Of members that all want to leave, one that is heard of, and of these the one that wanted to last.
fn first_to_stay(federation: &Federation, leaver: &Leaver) -> impl Ord + use<> {
    let wanted_at = leaver.site["metadata"]["deletionTimestamp"].as_str();
    (
        federation.is_unheard(&leaver.member.node),
        Reverse(wanted_at.unwrap_or_default().to_owned()),
        leaver.member.site.name.clone(),
    )
}

async fn call_off(catalog: &Catalog, leaver: &Leaver) -> anyhow::Result<()> {
    let mut site = leaver.site.clone();
    if let Some(metadata) = site.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("deletionTimestamp");
        metadata.remove("deletionGracePeriodSeconds");
        if let Some(annotations) = metadata
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.remove(FORCED);
        }
    }
    let name = &leaver.member.site.name;
    let operations = vec![
        put(
            records::object_key("sites", "", name),
            records::write(&site),
            Expect::Revision(leaver.entry.modified),
        ),
        Operation::Delete {
            key: records::leaving_key(&leaver.member.node),
            expect: Expect::Any,
        },
    ];
    let command = Command::new(operations);
    catalog
        .host
        .propose(GroupId::META, command, PATIENCE)
        .await?;
    warn!(
        site = name,
        "every site was to leave: this one stays, for the federation would be lost with it"
    );
    Ok(())
}

/// Sites that may lead groups and do not know that `node` gives its votes away. One that counts as lost
/// leads nothing.
async fn unaware_of(federation: &Federation, node: &NodeId) -> Vec<String> {
    let moment = federation.moment();
    let members = federation.catalog.members();
    let asked = members.iter().filter(|member| {
        let is_lost = || moment.sight(&member.node, federation.lost_after) == Sight::Lost;
        member.node != *node && !is_lost()
    });
    let answers = asked.map(async |member| {
        let knows = if member.node == federation.own {
            federation.giving_votes.lock().contains(node)
        } else {
            let question = Request::GivesVotes(*node);
            let answer = crate::net::ask(&federation.network, member.node, &question).await;
            matches!(answer, Ok(Reply::Noted(known)) if known == [true])
        };
        (!knows).then(|| member.site.name.clone())
    });
    let answers = futures::future::join_all(answers).await;
    answers.into_iter().flatten().collect()
}

/// What there is of it; when it began is not known here.
async fn rest(federation: &Federation, leaver: &Leaver) -> anyhow::Result<Rest> {
    let (catalog, node) = (federation.catalog.clone(), leaver.member.node);
    let apps = tokio::task::spawn_blocking(move || apps_at(&catalog, &node)).await?;
    let replica = leaver.member.replica;
    let status = federation.catalog.host.status().borrow().clone();
    let groups = Catalog::all_groups(federation.catalog.shards);
    if let Some(missing) = groups.iter().find(|group| !status.contains_key(group)) {
        anyhow::bail!("this node does not know yet who votes in {missing}");
    }
    let votes = status
        .values()
        .filter(|group| group.voters.contains(&replica))
        .count();
    let finalizers = leaver.site.pointer("/metadata/finalizers");
    let held_by = finalizers.and_then(Value::as_array).into_iter().flatten();
    let held_by = held_by.filter_map(Value::as_str);
    Ok(Rest {
        apps,
        votes,
        unheard: federation.is_unheard(&node),
        forced: leaver.forced(),
        held_by: held_by
            .filter(|name| *name != MEMBER_FINALIZER)
            .map(ToOwned::to_owned)
            .collect(),
        ..Rest::default()
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

/// Notes what keeps it, for whoever looks at the site, and whether its votes are to go.
async fn tell(
    catalog: &Catalog,
    leaver: &Leaver,
    waits: String,
    gives_votes: bool,
) -> anyhow::Result<()> {
    let key = records::leaving_key(&leaver.member.node);
    let news = Leaving { waits, gives_votes };
    let known = catalog.read::<Leaving>(GroupId::META, &key);
    if known.is_some_and(|(known, _)| known == news) {
        return Ok(());
    }
    info!(
        site = leaver.member.site.name,
        reason = news.waits,
        "a site is leaving"
    );
    let operations = vec![
        Operation::Check {
            key: records::object_key("sites", "", &leaver.member.site.name),
            expect: Expect::Revision(leaver.entry.modified),
        },
        put(key, records::write(&news), Expect::Any),
    ];
    let command = Command::new(operations);
    catalog
        .host
        .propose(GroupId::META, command, PATIENCE)
        .await?;
    Ok(())
}

async fn remove(catalog: &Catalog, leaver: &Leaver) -> anyhow::Result<()> {
    let member = &leaver.member;
    let name = &member.site.name;
    let departure = Departure {
        site: name.clone(),
        left_at: now(),
        forced: leaver.forced(),
    };
    let delete = |key: String, expect| Operation::Delete { key, expect };
    let unchanged = Expect::Revision(leaver.entry.modified);
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

/// What other members say of whether this node left. One alone is not believed where others may be
/// asked, and nobody is while as many say otherwise: a member that has not heard of it yet, or lies.
#[derive(Debug, Default)]
pub struct Standing(BTreeMap<NodeId, Option<Departure>>);

impl Standing {
    /// Asks one of them, and returns whether this node left as far as all `others` that answered know.
    pub async fn ask(
        &mut self,
        network: &Network,
        asked: &Member,
        others: usize,
    ) -> Option<Departure> {
        let said = ask_standing(network, asked).await?;
        let before = self.0.insert(asked.node, said.clone());
        if let (Some(departure), None | Some(None)) = (said, before) {
            warn!(
                by = asked.site.name,
                left_at = %departure.left_at,
                "told that this node left the federation"
            );
        }
        self.verdict(others)
    }

    /// Forgets what was said: the others speak with this node.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    fn verdict(&self, others: usize) -> Option<Departure> {
        let said: Vec<&Departure> = self.0.values().flatten().collect();
        let otherwise = self.0.len() - said.len();
        let believed = said.len() >= others.clamp(1, WITNESSES) && said.len() > otherwise;
        believed.then(|| said.first().copied().cloned()).flatten()
    }
}

/// Whether this node left, as one member knows: those that are no members are told nothing else.
async fn ask_standing(network: &Network, member: &Member) -> Option<Option<Departure>> {
    let question = rpc::encode(&Knock::Standing).ok()?;
    let answer = network
        .join(member.node, &member.addresses, &question, STANDING_TIME)
        .await;
    match answer.map(|bytes| rpc::decode::<JoinReply>(&bytes)) {
        Ok(Ok(JoinReply::Left(departure))) => return Some(Some(departure)),
        Ok(Ok(JoinReply::NotLeft)) => return Some(None),
        Ok(Ok(_)) => debug!(node = %member.node, "an answer to another question"),
        Ok(Err(error)) => debug!(node = %member.node, %error, "an answer that is not one"),
        Err(error) => debug!(node = %member.node, %error, "not asked whether we are a member"),
    }
    None
}

#[cfg(test)]
mod tests {
    use krake_model::Timestamp;

    use super::*;

    fn rest(apps: &[&str], votes: usize) -> Rest {
        let app = |name: &&str| AppKey::new("default", *name);
        Rest {
            apps: apps.iter().map(app).collect(),
            votes,
            ..Rest::default()
        }
    }

    fn waits(next: Next) -> String {
        match next {
            Next::Wait(text) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn copies_keep_it_first_and_the_reason_says_what_to_do() {
        let text = waits(next("oslo", &rest(&["shop"], 4)));
        assert!(text.contains("1 copy (default/shop)"), "{text}");
        assert!(text.contains("krakectl why"), "{text}");
        let text = waits(next("oslo", &rest(&["a", "b", "c", "d"], 1)));
        assert!(
            text.contains("4 copies (default/a, default/b, default/c, …)"),
            "{text}"
        );
        let unheard = Rest {
            unheard: true,
            ..rest(&["shop"], 0)
        };
        let text = waits(next("oslo", &unheard));
        assert!(text.contains("krakectl delete site oslo --force"), "{text}");
    }

    #[test]
    fn then_it_gives_its_votes_away_and_goes() {
        let young = Rest {
            young: true,
            ..rest(&[], 4)
        };
        assert!(waits(next("oslo", &young)).contains("on its way"));
        let Next::GiveVotes(text) = next("oslo", &rest(&[], 4)) else {
            panic!("it votes")
        };
        assert!(text.contains("its votes in 4 groups"), "{text}");
        // Nobody may be about to give it one.
        assert!(matches!(next("oslo", &rest(&[], 0)), Next::GiveVotes(_)));
        let told = Rest {
            gives_votes: true,
            ..rest(&[], 0)
        };
        assert_eq!(next("oslo", &told), Next::LetGo);
        let told = Rest {
            unaware: vec!["paris".to_owned()],
            ..told
        };
        let Next::GiveVotes(text) = next("oslo", &told) else {
            panic!("paris could give it one")
        };
        assert!(text.contains("paris"), "{text}");
    }

    #[test]
    fn force_does_not_wait_for_copies_but_for_votes_and_for_who_else_holds_it() {
        let forced = |votes| Rest {
            forced: true,
            young: true,
            gives_votes: true,
            ..rest(&["shop"], votes)
        };
        assert_eq!(next("oslo", &forced(0)), Next::LetGo);
        assert!(matches!(next("oslo", &forced(1)), Next::GiveVotes(_)));
        let held = Rest {
            held_by: vec!["example.org/audit".to_owned()],
            ..forced(0)
        };
        assert!(waits(next("oslo", &held)).contains("example.org/audit"));
    }

    #[test]
    fn one_member_alone_is_not_believed_nor_while_as_many_say_otherwise() {
        let left = || {
            Some(Departure {
                site: "oslo".to_owned(),
                left_at: Timestamp::from_millis(1),
                forced: false,
            })
        };
        let node = |number| NodeId::from_bytes([number; 32]);
        let said = |said: &[Option<Departure>]| {
            Standing((1..).map(node).zip(said.iter().cloned()).collect())
        };
        assert_eq!(said(&[left()]).verdict(1), left(), "there is no other one");
        assert_eq!(said(&[left()]).verdict(4), None);
        assert_eq!(said(&[left(), left()]).verdict(4), left());
        assert_eq!(said(&[left(), left(), None, None]).verdict(4), None);
        assert_eq!(said(&[left(), left(), None, left()]).verdict(4), left());
        assert_eq!(said(&[None]).verdict(1), None);
    }
}
